"""Clients that are forked are processes like any other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import leaks
import psutil
import pytest
from daemon_process import DaemonProcess, running_daemon
from fork_server import is_traced
from processes import ClientProcess


@pytest.fixture
def host_daemon(tmp_path: Path):
    with running_daemon(tmp_path) as running:
        yield running


def descriptors(client: ClientProcess, *names: str) -> list[str]:
    folder = Path(f"/proc/{client.pid}/fd")
    return [os.readlink(folder / name) for name in names or os.listdir(folder)]


def test_each_has_a_pid_descriptors_and_an_end_of_its_own(host_daemon: DaemonProcess) -> None:
    before = leaks.Snapshot.take()
    with (
        ClientProcess(host_daemon.runtime_dir, "one") as one,
        ClientProcess(host_daemon.runtime_dir, "two") as two,
    ):
        assert one.call("ping") == two.call("ping")
        with host_daemon.client("looker") as looker:
            sessions = {each.hello.name: each.pid for each in looker.status().sessions}
        assert (sessions["one"], sessions["two"]) == (one.pid, two.pid)
        assert len({one.pid, two.pid, os.getpid()}) == 3
        for client in (one, two):
            left = [line for line in leaks.find_leaks(before, patience=0) if "process " in line]
            assert any(f"process {client.pid}:" in line for line in left)
        # Of the first one's pipes the second has none.
        assert not set(descriptors(one, "0", "1")) & set(descriptors(two))
        one.kill()
        assert one.wait() == -signal.SIGKILL
        assert not psutil.pid_exists(one.pid)
        assert two.call("ping")
    assert two.wait() == 0
    assert leaks.find_leaks(before) == []


def test_what_imports_may_have_read_is_not_taken_over(
    host_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a client is started as any other program."""
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    for forked in (True, False):
        with ClientProcess(host_daemon.runtime_dir) as client:
            assert client.call("ping")
            expected = forked and not is_traced(os.environ)
            assert (psutil.Process(client.pid).ppid() != os.getpid()) is expected
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
