"""What is skipped for want of a tool is said at the end of a run, not only among other skips."""

from __future__ import annotations

from pathlib import Path

import pytest

SOURCE = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_one(number):
    pytest.skip("NOT TESTED: apt-get install a-tool")

def test_other():
    pytest.skip("this machine has no GPU")
"""


def test_it_is_said_loudly(pytester: pytest.Pytester) -> None:
    here = Path(__file__).parent
    pytester.makepyfile(test_skipped=SOURCE)
    pytester.makeconftest((here / "conftest.py").read_text())
    pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\npythonpath = [{str(here)!r}]\n")
    result = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["!* NOT TESTED, for want of a tool !*"])
    result.stdout.fnmatch_lines(["2 tests: NOT TESTED: apt-get install a-tool"])
    result.stdout.no_fnmatch_line("*tests: this machine has no GPU")
