"""The log: one line for an event, with its level as journald reads it, and ids of requests."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, running_daemon
from xdit_sidecar.daemon.log_output import LineFormatter
from xdit_sidecar.protocol.errors import SidecarError


def test_a_traceback_is_one_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.LogRecord(
            "x", logging.ERROR, __file__, 1, "broke name=%s", ("a\nb",), sys.exc_info()
        )
    line = LineFormatter(journal=False).format(record)
    assert line.startswith(r"ERROR broke name=a\nb traceback=")
    assert "\n" not in line
    assert r"ValueError: first\nsecond" in line
    assert LineFormatter(journal=True).format(record).startswith("<3>broke ")


def test_levels_for_the_journal(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    try:
        # As systemd does: the variable names the very file that standard error is.
        daemon.log_path.touch()
        found = daemon.log_path.stat()
        daemon._environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
        daemon.start()
        assert daemon.wait_for_log("serving").startswith("<6>serving directory=")
        daemon.stop()
        assert all(re.match(r"<[3-7]>[a-z-]+( |$)", line) for line in daemon.log.splitlines())
    finally:
        daemon.close()


def test_requests_are_told_with_their_ids(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--log-level", "debug") as daemon:
        with daemon.client("asker") as client, pytest.raises(SidecarError):
            client.evict("bytes:" + "0" * 64, "cpu")
        line = daemon.wait_for_log("kind=evict")
    assert re.fullmatch(
        rf"DEBUG request-ended session=s\d+ request=\d+ pid={os.getpid()} kind=evict "
        r'outcome="unknown-component" seconds=0\.\d+',
        line,
    )


def test_a_level_leaves_out_what_is_below(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--log-level", "warning") as daemon:
        with daemon.client() as client:
            client.ping()
        assert daemon.stop() == 0
        assert daemon.log == ""


def test_a_misspelt_variable_is_told(tmp_path: Path) -> None:
    with running_daemon(tmp_path, environment={"XDIT_SIDECAR_BUDGETS": "1G"}) as daemon:
        assert "did you mean XDIT_SIDECAR_BUDGET?" in daemon.wait_for_log("setting-ignored")


def test_a_blocked_loop_that_the_watchdog_ends_tells_where(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon._command[1:3] = [str(Path(__file__).with_name("blockable_daemon.py"))]
    try:
        daemon.start()
        subprocess.run(["kill", "-USR2", str(daemon.pid)], check=True)
        daemon.wait_for_log("blocked")
        subprocess.run(["kill", "-ABRT", str(daemon.pid)], check=True)
        assert daemon.process is not None
        assert daemon.process.wait(10) == -6
        assert "Fatal Python error: Aborted" in daemon.log
        assert "in sleep_and_say" in daemon.log
    finally:
        daemon.close()
