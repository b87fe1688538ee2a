"""``make soak``: every stage with its full count, in a process of its own; resumable.

A stage's result lies in ``.cache/soak/`` until the code changes; when all are there they are
written to ``benchmarks/results/soak.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "examples", "benchmarks")]

import project  # noqa: E402
from machine import describe_run  # noqa: E402

from soak.stages import PATIENT, STAGES  # noqa: E402

CACHE = ROOT / ".cache/soak"
RESULT = ROOT / "benchmarks/results/soak.json"
_CODE = ("protocol", "daemon", "comfy_client_node", "examples", "tests")
_AT_ONCE = 3  # of the stages that mostly wait
_running: set[subprocess.Popen[str]] = set()
_LIMIT = 3_600.0  # seconds; a stage takes a quarter of that at most, if it does not hang


def git(*arguments: str) -> str:
    """Output of a git command in the project; empty without git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def digest() -> str:
    """What is being tested, whichever commit it is part of."""
    found = hashlib.sha256()
    for path in project.files():
        if path.parts[0] in _CODE:
            found.update(f"{path}\0".encode() + (project.ROOT / path).read_bytes())
    return found.hexdigest()[:16]


def run_stage(name: str, code: str) -> bool:
    """One stage in a process of its own. Whether it went well."""
    began = time.monotonic()
    stage = subprocess.Popen(
        [sys.executable, __file__, "--inside", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _running.add(stage)
    try:
        out, err = stage.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        end_group(stage)
        say(name, f"ENDED: it took more than {_LIMIT:.0f} s\n{stage.communicate()[1]}")
        return False
    finally:
        _running.discard(stage)
        end_group(stage)
    seconds = time.monotonic() - began
    if stage.returncode:
        say(name, f"FAILED after {seconds:.0f} s\n{err}")
        return False
    about = {"code": code, "commit": git("rev-parse", "HEAD") or "unknown"}
    result = {**about, **json.loads(out), "stage_seconds": round(seconds, 1)}
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / f"{name}.json").write_text(json.dumps(result, indent=1))
    say(name, f"ok, {seconds:.0f} s")
    return True


def run_together(names: list[str], code: str) -> list[str]:
    """Several stages at once. Those that did not go well."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    went = [pool.submit(run_stage, name, code) for name in names]
    try:
        return [name for name, future in zip(names, went, strict=True) if not future.result()]
    finally:  # of an interrupted run: what has not ended is ended
        pool.shutdown(wait=False, cancel_futures=True)
        for stage in list(_running):
            end_group(stage)


def say(name: str, text: str) -> None:
    """A line about a stage."""
    print(f"{name:<28} {text}", flush=True)


def end_group(stage: subprocess.Popen[str]) -> None:
    """The stage with every process that it started: it may hang, or this run is interrupted."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(stage.pid, signal.SIGKILL)


def finished(name: str, code: str) -> dict[str, object] | None:
    """The result of an earlier run of the same code."""
    try:
        result: dict[str, object] = json.loads((CACHE / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if result.get("code") == code else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="only stages whose names contain this")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument("--inside", metavar="NAME", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.inside:
        with contextlib.redirect_stdout(sys.stderr):
            figures = STAGES[arguments.inside]()
        print(json.dumps(figures))
        return 0
    code = digest()
    chosen = [name for name in STAGES if not arguments.only or arguments.only in name]
    if not chosen:
        parser.error(f"no stage is called {arguments.only!r}: {', '.join(STAGES)}")
    left = [name for name in chosen if arguments.fresh or not finished(name, code)]
    for name in chosen:
        if name not in left:
            say(name, "done before")
    # First those that measure; then, several at once, those that wait for restarts and deadlines.
    alone = [name for name in left if name not in PATIENT]
    failed = [name for name in alone if not run_stage(name, code)]
    failed += run_together([name for name in PATIENT if name in left], code)
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    output = arguments.output or (RESULT if chosen == list(STAGES) else None)
    if output is not None:
        write_report(output, {name: finished(name, code) or {} for name in chosen})
    return 0


def write_report(output: Path, results: dict[str, dict[str, object]]) -> None:
    """The JSON that is committed."""

    def total(figure: str) -> int:
        return round(sum(float(str(result.get(figure, 0))) for result in results.values()))

    inputs, seconds = total("inputs"), total("stage_seconds")
    sums = {"hostile_inputs": inputs, "seconds": seconds}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**describe_run(), **sums, "stages": results}, indent=1) + "\n")
    print(f"{inputs} hostile inputs, {seconds} s; written to {output}")


if __name__ == "__main__":
    sys.exit(main())
