"""Starting and stopping as people and service managers do it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, running_daemon


def refused(daemon: DaemonProcess, match: str, status: int) -> None:
    """The daemon ends with one sentence and leaves nothing of its own behind."""
    with pytest.raises(AssertionError, match=match):
        daemon.start()
    assert "Traceback" not in daemon.log
    assert daemon.process is not None
    assert daemon.process.wait(10) == status
    assert not [path for path in daemon.runtime_dir.iterdir() if not path.is_dir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_way_to_stop_is_clean(tmp_path: Path, number: int) -> None:
    with running_daemon(tmp_path, "--ranks", "1") as daemon:
        assert daemon.process is not None
        daemon.process.send_signal(number)
        assert daemon.process.wait(10) == 0
        assert not list(daemon.runtime_dir.iterdir())
        assert "keeper-lost" not in daemon.log


def test_something_in_the_way_of_a_socket(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    (daemon.runtime_dir / "control.sock").mkdir()
    try:
        refused(daemon, "cannot serve in", 2)
    finally:
        (daemon.runtime_dir / "control.sock").rmdir()
        daemon.close()


def test_a_directory_of_an_earlier_shared_daemon_is_closed_again(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--trust-uid", "12345") as daemon:
        assert daemon.runtime_dir.stat().st_mode & 0o777 == 0o711
        daemon.stop()
        daemon._command = [word for word in daemon._command if word not in ("--trust-uid", "12345")]
        daemon.start()
        assert daemon.runtime_dir.stat().st_mode & 0o777 == 0o700


def test_a_directory_open_to_all_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "--trust-uid", "12345")
    daemon.runtime_dir.chmod(0o1777)
    try:
        refused(daemon, "wider than 0711", 2)
        assert daemon.runtime_dir.stat().st_mode & 0o7777 == 0o1777
    finally:
        daemon.close()
