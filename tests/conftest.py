"""Fixtures and rules that hold for every test."""

from __future__ import annotations

import gc
import itertools
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import leaks
import platforms
import pytest
from daemon_process import COMMANDS, DaemonProcess, daemon_environment, running_daemon
from fork_server import fork_server
from work_order import SlowestFirst
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver
from xdit_sidecar.protocol.regions.table import process_regions

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["pytester"]

# Machines that run tests in parallel are slow at times; a time limit per example only makes noise.
hypothesis.settings.register_profile("xdit-sidecar", deadline=None)
hypothesis.settings.load_profile("xdit-sidecar")
leaks.mark_children()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is for what a shell runs in the background, and for all that this starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session", autouse=True)
def _cuda_context() -> None:
    """On a real GPU: what driver and torch open for good is open before the first test."""
    if platforms.REAL_CUDA:
        import torch

        driver = CudaDriver.load()
        everyone = range(driver.device_count())
        for ordinal in everyone:
            torch.ones(1, device=torch.device("cuda", ordinal)).cpu()
            driver.memory_info(ordinal)
        for ordinal, peer in itertools.permutations(everyone, 2):
            driver.reach_peer(ordinal, peer)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_in_the_end(_cuda_context: None) -> Iterator[None]:
    """The same for processes and shared memory of fixtures, once all of them are torn down.

    Not after each module: some belong to the session and begin in any. Not for descriptors and
    threads: libraries keep theirs.
    """
    before = leaks.Snapshot.take()
    yield
    found = [n for n in leaks.find_leaks(before) if n.startswith(("process ", "shared memory "))]
    if found:
        pytest.fail("left by fixtures:\n" + "\n".join(f"  {n}" for n in found), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _forked_commands(_nothing_left_in_the_end: None) -> Iterator[None]:
    """Imports are most of what a daemon without ranks costs, and of any other command."""
    with fork_server("command", COMMANDS, daemon_environment()):
        yield


@pytest.fixture(params=platforms.PLATFORMS)
def platform(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[platforms.Platform]:
    """Each device that regions can lie on, with this process set up for it."""
    with _set_up(platforms.make_platform(request.param, tmp_path), monkeypatch) as made:
        yield made


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Their UUIDs, with this process set up for CUDA on two GPUs."""
    made = platforms.make_platform(platforms.PLATFORMS[-1], tmp_path)
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    with _set_up(made, monkeypatch):
        driver = CudaDriver.load()
        if driver.device_count() < 2:
            pytest.skip("NOT TESTED on real CUDA: this machine has one GPU")
        yield [driver.device_uuid(ordinal) for ordinal in range(2)]


@contextmanager
def _set_up(
    made: platforms.Platform, monkeypatch: pytest.MonkeyPatch
) -> Iterator[platforms.Platform]:
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    if made.name == "fake-cuda":
        gc.collect()  # views of regions that a failed test left in its traceback
        process_regions.collect(5.0)
        driver = CudaDriver.load()
        for ordinal in range(driver.device_count()):
            driver.release_primary_context(ordinal)


@pytest.fixture
def daemon(platform: platforms.Platform, tmp_path: Path) -> Iterator[DaemonProcess]:
    """A real daemon that serves the platform's device, and host memory."""
    with running_daemon(tmp_path, device=platform.option) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("allow_leaks")
        if marker and not (marker.args or marker.kwargs.get("reason")):
            raise pytest.UsageError(f"{item.nodeid}: allow_leaks needs a reason")
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver answers"))


def pytest_collection() -> None:
    # What the tests import stays to the end; each look for garbage goes through all of it.
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested for want of a tool: such reasons say what to install."""
    lacking = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and re.search(r"\binstall\b", report.longrepr[2])
    )
    if lacking:
        terminalreporter.section("NOT TESTED, for want of a tool", sep="!", red=True, bold=True)
    for reason, number in sorted(lacking.items()):
        terminalreporter.line(f"{number} tests: {reason}", red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SlowestFirst:
    return SlowestFirst(config, log)


def _has_gpu() -> bool:
    # In a process of its own: a CUDA context here would not survive a fork.
    command = [sys.executable, str(ROOT / "tools/setup_env.py"), "--driver"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout.strip() != "none"
