"""Fixtures and rules that hold for every test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import leaks
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["pytester"]

# Machines that run tests in parallel are slow at times; a time limit per example only makes noise.
hypothesis.settings.register_profile("xdit-sidecar", deadline=None)
hypothesis.settings.load_profile("xdit-sidecar")
leaks.mark_children()


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves descriptors, processes, threads or shared memory behind."""
    if request.node.get_closest_marker("allow_leaks"):
        yield
        return
    before = leaks.Snapshot.take()
    yield
    found = leaks.find_leaks(before)
    if found:
        pytest.fail("left behind:\n" + "\n".join(f"  {line}" for line in found), pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("allow_leaks")
        if marker and not (marker.args or marker.kwargs.get("reason")):
            raise pytest.UsageError(f"{item.nodeid}: allow_leaks needs a reason")
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver answers"))


def _has_gpu() -> bool:
    # In a process of its own: a CUDA context here would not survive a fork.
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), "--driver"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout.strip() != "none"
