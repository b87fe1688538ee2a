"""Everything that must be seen on a real GPU, in stages that can be run again alone.

Usage: ``python benchmarks/gpu/run.py OUTPUT [STAGE…]``. Needs no network: packages that the
machine lacks are taken from the wheels in ``$XDIT_WHEELS``. Each stage writes its JSON at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from machine import describe_run  # noqa: E402

TESTS = ["tests/regions", "tests/sharing", "tests/health"]
STAGE_SECONDS = 420
COMFYUI_SECONDS = 560


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
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    }


def run(command: list[str], environment: dict[str, str], seconds: float = STAGE_SECONDS) -> int:
    """Exit status; 124 when the stage took too long."""
    try:
        return subprocess.run(
            command, env=environment, cwd=ROOT, timeout=seconds, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def test_stage(output: Path, environment: dict[str, str]) -> int:
    """The sharing tests with the real driver, summarised from pytest's own report."""
    report = output / "tests.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:benchmark"),
        *("-m", "not soak and not bench", f"--junitxml={report}", *TESTS),
    ]
    began = time.monotonic()
    status = run(command, environment)
    results: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  our own file
            name = f"{case.get('classname')}::{case.get('name')}"
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "passed"
            results["skipped" if "skipped" in kinds else kind].append(name)
        report.unlink()
    summary = {
        **describe_run(),
        "allocator": environment["PYTORCH_CUDA_ALLOC_CONF"],
        "seconds": round(time.monotonic() - began, 1),
        "exit_status": status,
        "counts": {kind: len(names) for kind, names in results.items()},
        "tests": {kind: sorted(names) for kind, names in results.items()},
    }
    (output / "tests.json").write_text(json.dumps(summary, indent=2) + "\n")
    return status


def sharing_stage(output: Path, environment: dict[str, str]) -> int:
    """Times and memory of hand-over, attach and deaths."""
    return run([sys.executable, str(HERE / "sharing.py"), str(output)], environment)


def health_stage(output: Path, environment: dict[str, str]) -> int:
    """The health-check with a rank."""
    return run([sys.executable, str(HERE / "health.py"), str(output)], environment)


def demo_stage(output: Path, environment: dict[str, str]) -> int:
    """What ``make demo`` runs, on the GPU."""
    return run([sys.executable, str(ROOT / "examples" / "demo.py")], environment)


def soak_stage(output: Path, environment: dict[str, str]) -> int:
    """10,000 cycles by eight client processes that are killed and stopped meanwhile."""
    soak = [sys.executable, str(ROOT / "tests" / "soak" / "run.py"), "--fresh"]
    result = output / "soak-cycles.json"
    return run([*soak, "--only", "cycles-real-cuda", "--output", str(result)], environment)


def flux_stage(output: Path, environment: dict[str, str]) -> int:
    """FLUX.1-dev at full size from a shared region, by one process and by two ranks."""
    return run([sys.executable, str(HERE / "flux_forward.py"), str(output)], environment)


def serving_stage(output: Path, environment: dict[str, str]) -> int:
    """The ranks at full size: forwards, a picture, a killed rank, a full card, two ranks."""
    return run([sys.executable, str(HERE / "serving.py"), str(output)], environment)


def load_stage(output: Path, environment: dict[str, str]) -> int:
    """A file of FLUX.1-dev's size from the page cache into a region, and attached afterwards."""
    return run([sys.executable, str(HERE / "load_file.py"), str(output)], environment)


def comfyui_stage(output: Path, environment: dict[str, str]) -> int:
    """A real ComfyUI, as `pack_comfyui.py` packed it, on the ranks' models at full size."""
    # The first part of the names of the cases that are wanted; all by default.
    cases = [case for case in os.environ.get("XDIT_COMFYUI_CASES", "").split(",") if case]
    command = [sys.executable, str(HERE / "real_comfyui.py"), str(output), *cases]
    return run(command, environment, COMFYUI_SECONDS)


STAGES = {
    "tests": test_stage,
    "sharing": sharing_stage,
    "load": load_stage,
    "health": health_stage,
    "demo": demo_stage,
    "soak": soak_stage,
    "flux": flux_stage,
    "serving": serving_stage,
    "comfyui": comfyui_stage,
}


def main() -> int:
    """Run the stages that are named, or all; 0 when all succeeded."""
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
