"""Everything that must be seen on a real GPU, in stages that can be run again alone.

Usage: ``python benchmarks/gpu/run.py OUTPUT [STAGE…]``, with ``--list`` the stages. Needs no
network: packages that the machine lacks are taken from the wheels in ``$XDIT_WHEELS``. Each stage
writes its ``gpu-*.json`` at once and ends within nine minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from figures import Figure  # noqa: E402
from machine import describe_run  # noqa: E402

_FORKS = "tests/ranks/service/test_fork_server.py"
TESTS = ["-n", "4", "tests/regions", "tests/sharing", "tests/health", _FORKS]
# In a process of its own, as torch computes on the GPU in it, and with the allocator of ranks.
TESTS_IN_TORCH = ["tests/ranks/test_recorded_forward.py", "tests/ranks/test_kernels.py"]
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
STAGE_SECONDS = 535
Stage = Callable[[Path, dict[str, str]], int]


def prepare() -> dict[str, str]:
    """An environment in which the package and its tests can be imported from this checkout."""
    site = Path(tempfile.mkdtemp(prefix="xdit-site-"))
    if wheels := os.environ.get("XDIT_WHEELS"):
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
                *("--target", str(site), *map(str, sorted(Path(wheels).glob("*.whl")))),
            ],
            check=True,
        )
    (site / "xdit_sidecar").symlink_to(ROOT)
    sys.path.insert(0, str(site))  # for the versions in the results
    return {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "XDIT_TEST_REAL_CUDA": "1",
        ALLOCATOR: "backend:cudaMallocAsync",
    }


def run(command: list[str], environment: dict[str, str]) -> int:
    """Exit status, as a shell gives it.

    124 when the stage took too long and was ended with all that it had started.
    """
    stage = subprocess.Popen(command, env=environment, cwd=ROOT, process_group=0)
    try:
        status = stage.wait(STAGE_SECONDS)
        return status if status >= 0 else 128 - status
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if stage.poll() is None:
            os.killpg(stage.pid, signal.SIGKILL)
            stage.wait()


def test_stage(output: Path, environment: dict[str, str]) -> int:
    """The tests of what needs a real driver, summarised from pytest's own reports."""
    report = output / "tests.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", f"--junitxml={report}"]
    began = time.monotonic()
    status = 0
    results: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    of_ranks = {name: value for name, value in environment.items() if name != ALLOCATOR}
    for tests, its_environment in ((TESTS, environment), (TESTS_IN_TORCH, of_ranks)):
        status = run([*pytest, *tests], its_environment) or status
        if not report.exists():
            continue
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  our own file
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "passed"
            results["skipped" if "skipped" in kinds else kind].append(name)
        report.unlink()
    summary = {
        **describe_run(),
        "allocator": f"{environment[ALLOCATOR]}, of ranks torch's own",
        "seconds": round(time.monotonic() - began, 1),
        "exit_status": status,
        "figures": [
            Figure("tests failed", len(results["failed"]), "", 0).as_dict(),
            Figure("exit status", status, "", 0).as_dict(),
        ],
        "counts": {kind: len(names) for kind, names in results.items()},
        "tests": {kind: sorted(names) for kind, names in results.items()},
    }
    (output / "gpu-tests.json").write_text(json.dumps(summary, indent=2) + "\n")
    return status


def demo_stage(output: Path, environment: dict[str, str]) -> int:
    """What ``make demo`` runs, on the GPU."""
    began = time.monotonic()
    status = run([sys.executable, str(ROOT / "examples" / "demo.py")], environment)
    figures = [
        Figure("exit status", status, "", 0),
        Figure("the demo", time.monotonic() - began, "s"),
    ]
    result = {**describe_run(), "figures": [figure.as_dict() for figure in figures]}
    (output / "gpu-demo.json").write_text(json.dumps(result, indent=2) + "\n")
    return status


def soak_stage(output: Path, environment: dict[str, str]) -> int:
    """10,000 cycles by eight client processes that are killed and stopped meanwhile."""
    soak = [sys.executable, str(ROOT / "tests" / "soak" / "run.py"), "--fresh"]
    result = output / "gpu-soak-cycles.json"
    return run([*soak, "--only", "cycles-real-cuda", "--output", str(result)], environment)


def comfyui_stage(output: Path, environment: dict[str, str]) -> int:
    """A real ComfyUI on the ranks' models at full size."""
    # The first part of the names of the cases that are wanted; all by default.
    cases = [case for case in os.environ.get("XDIT_COMFYUI_CASES", "").split(",") if case]
    return run([sys.executable, str(HERE / "real_comfyui.py"), str(output), *cases], environment)


def program(name: str) -> Stage:
    """The stage that is a program beside this one, which writes its own result."""

    def stage(output: Path, environment: dict[str, str]) -> int:
        return run([sys.executable, str(HERE / f"{name}.py"), str(output)], environment)

    return stage


# What each is, its module says.
STAGES: dict[str, Stage] = {
    "tests": test_stage,
    "sharing": program("sharing"),
    "load": program("load_file"),
    "health": program("health"),
    "demo": demo_stage,
    "soak": soak_stage,
    "flux": program("flux_forward"),
    "serving": program("serving"),
    "floor": program("floor"),
    "sizes": program("sizes"),
    "prompts": program("prompts"),
    "steps": program("steps"),
    "lora": program("lora"),
    "fp8": program("fp8_error"),
    "comfyui": comfyui_stage,
    "several": program("several_gpus"),
}


def main() -> int:
    """Run the stages that are named, or all; 0 when all succeeded."""
    if "--list" in sys.argv:
        print(*STAGES, sep="\n")
        return 0
    if len(sys.argv) < 2 or (unknown := set(sys.argv[2:]) - set(STAGES)):
        print(__doc__ if len(sys.argv) < 2 else f"no stage {', '.join(sorted(unknown))}")
        return 2
    output, *names = sys.argv[1:]
    directory = Path(output).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    environment = prepare()
    failed = []
    for name in names or STAGES:
        print(f"--- {name}", flush=True)
        if STAGES[name](directory, environment) != 0:
            failed.append(name)
    print(f"--- failed: {', '.join(failed) or 'nothing'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
