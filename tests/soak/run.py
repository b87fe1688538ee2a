"""``make soak``: every stage with its full count, in a process of its own; resumable.

A stage's result lies in ``.cache/soak/`` until the commit changes; when all are there they are
written to ``benchmarks/results/soak.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "examples", "benchmarks")]

import project  # noqa: E402
from machine import describe_run  # noqa: E402

from soak.stages import STAGES  # noqa: E402

CACHE = ROOT / ".cache/soak"
RESULT = ROOT / "benchmarks/results/soak.json"
_CODE = ("protocol", "daemon", "comfy_client_node", "examples", "tests")


def git(*arguments: str) -> str:
    """Output of a git command in the project; empty without git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """What is being tested: the commit, and a digest of the code where it differs from that."""
    head = git("rev-parse", "HEAD") or "unknown"
    if head != "unknown" and not git("status", "--porcelain", "--", *_CODE):
        return head
    digest = hashlib.sha256()
    for path in project.files():
        if path.parts[0] in _CODE:
            digest.update(f"{path}\0".encode() + (project.ROOT / path).read_bytes())
    return f"{head}+{digest.hexdigest()[:12]}"


def run_stage(name: str, tested: str) -> bool:
    """One stage in a process of its own, unless its result is there. Whether it went well."""
    began = time.monotonic()
    print(f"{name:<28} ", end="", flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--inside", name], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    if done.returncode:
        print(f"FAILED after {seconds:.0f} s\n{done.stderr}", flush=True)
        return False
    result = {"commit": tested, "seconds": round(seconds, 1), **json.loads(done.stdout)}
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"ok, {seconds:.0f} s", flush=True)
    return True


def finished(name: str, tested: str) -> dict[str, object] | None:
    """The result of an earlier run of the same code."""
    try:
        result: dict[str, object] = json.loads((CACHE / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if result["commit"] == tested else None


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
    tested = commit()
    chosen = [name for name in STAGES if not arguments.only or arguments.only in name]
    if not chosen:
        parser.error(f"no stage is called {arguments.only!r}: {', '.join(STAGES)}")
    failed = []
    for name in chosen:
        if not arguments.fresh and finished(name, tested):
            print(f"{name:<28} done before", flush=True)
        elif not run_stage(name, tested):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    output = arguments.output or (RESULT if chosen == list(STAGES) else None)
    if output is not None:
        write_report(output, {name: finished(name, tested) for name in chosen}, tested)
    return 0


def write_report(output: Path, results: dict[str, dict[str, object] | None], tested: str) -> None:
    """The JSON that is committed."""
    total = sum(int(str(r["inputs"])) for r in results.values() if r and "inputs" in r)
    report = {**describe_run(), "commit": tested, "hostile_inputs": total, "stages": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{total} hostile inputs; written to {output}")


if __name__ == "__main__":
    sys.exit(main())
