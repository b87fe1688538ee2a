"""What makes the tests quick: whole units in one process, and imports that nothing traces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from work_order import SHARING, SLOWEST, turn_of, unit_of

TESTS = Path(__file__).resolve().parent


def test_every_place_in_the_order_is_taken() -> None:
    units = {unit_of(path.relative_to(TESTS.parent).as_posix()) for path in TESTS.rglob("test_*")}
    assert {turn_of(unit) for unit in units} == set(range(len(SLOWEST) + 1))
    assert set(SHARING.values()) <= units


_CODE = """
import sys
files = []
def trace(frame, event, argument):
    files.append(frame.f_code.co_filename)
    return trace
def use():
    import numpy
    return numpy.zeros(1)
sys.settrace(trace)
use()
import csv
sys.settrace(None)
print([name for name in files if "numpy" in name])
print(any(name.endswith("csv.py") for name in files))
"""


def test_only_the_slow_imports_are_not_traced(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_CODE)
    for folder, untraced in ((TESTS / "untraced", True), (tmp_path, False)):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, program], env=environment, capture_output=True, text=True, check=True
        )
        found, others = done.stdout.splitlines()
        assert (found == "[]") is untraced
        assert others == "True"


def test_coverage_counts_what_comes_after_a_slow_import(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("def use():\n    import numpy\n    return numpy\n\nuse()\nfound = use()\n")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("COV")},
        "PYTHONPATH": str(TESTS / "untraced"),
    }
    coverage = [sys.executable, "-m", "coverage"]
    for arguments in (
        ["run", "program.py"],
        ["report", "--include=program.py", "--fail-under=100"],
    ):
        done = subprocess.run(
            [*coverage, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
