"""SIGHUP: what changes in a daemon that runs, what does not, and a terminal that hangs up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import termios
import time
from pathlib import Path

from daemon_process import DaemonProcess, running_daemon
from service.notify_socket import notify_socket
from xdit_sidecar.protocol.messages import Status


def reload(daemon: DaemonProcess, before: int) -> str:
    """The line that a reload logs, the ``before``th one so far."""
    os.kill(daemon.pid, signal.SIGHUP)
    deadline = time.monotonic() + 10
    while True:
        lines = [line for line in daemon.log.splitlines() if " reload" in line]
        if len(lines) > before:
            return lines[-1]
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.02)


def test_a_reload_applies_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('budget = "64MiB"\nreserve = "1MiB"\nranks = 0\n')
    with notify_socket(tmp_path / "notify") as manager:
        environment = {"NOTIFY_SOCKET": manager.address, "XDIT_SIDECAR_RANKS": ""}
        options = ("--config", str(file), "--deadline", "30")
        with running_daemon(tmp_path, *options, environment=environment) as daemon:
            first = daemon.wait_for_status(lambda s: s.devices[0].budget == 64 << 20)
            manager.wait_for("READY")
            file.write_text(
                'budget = "32MiB"\nidle = 0.5\nlog-level = "debug"\n'
                "ranks = 1\ntrust-uid = [12345]\ndeadline = 99\n"
            )
            line = reload(daemon, 0)
            # The flag is stronger than the file, also now: deadline has not changed.
            assert line.startswith("WARNING reloaded ")
            assert 'applied="budget,reserve,idle,log-level"' in line
            assert 'needs_restart="ranks,trust-uid"' in line
            message = manager.wait_for("RELOADING", "1")
            assert 0 < int(message["MONOTONIC_USEC"]) <= time.monotonic() * 1e6
            manager.wait_for("READY", "1")

            def applied(status: Status) -> bool:
                return status.devices[0].budget == 32 << 20 and not status.ranks

            second = daemon.wait_for_status(applied)
            assert second.boot_id == first.boot_id
            daemon.wait_for_log("DEBUG request-ended ")
            # Nothing new, but what needs a restart still does.
            line = reload(daemon, 1)
            assert "applied=nothing" in line
            assert 'needs_restart="ranks,trust-uid"' in line


def test_a_reload_with_an_error_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('budget = "64MiB"\n')
    with running_daemon(tmp_path, "--config", str(file)) as daemon:
        file.write_text('budget = "32MiB"\nidle = -1\n')
        line = reload(daemon, 0)
        assert line.startswith("ERROR reload-refused ")
        assert "idle in " in line
        file.unlink()
        assert "cannot read the configuration" in reload(daemon, 1)
        with daemon.client() as client:
            assert client.status().devices[0].budget == 64 << 20
        file.write_text('budget = "32MiB"\n')
        assert "applied=budget needs_restart=nothing" in reload(daemon, 2)


def test_a_terminal_that_hangs_up_ends_it_and_a_reload_there_does_not(tmp_path: Path) -> None:
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    daemon = DaemonProcess(tmp_path)
    try:
        with daemon.log_path.open("ab") as log:
            daemon.process = subprocess.Popen(
                daemon._command,
                stdin=theirs,
                stderr=log,
                env=daemon._environment,
                preexec_fn=take_terminal,
            )
        os.close(theirs)
        daemon.wait_for_log("serving", 30)
        assert "applied=nothing" in reload(daemon, 0)
        os.close(ours)
        ours = -1
        assert daemon.process.wait(15) == 0
        assert "INFO stopping" in daemon.log
        assert not list(daemon.runtime_dir.iterdir())
    finally:
        if ours >= 0:
            os.close(ours)
        with contextlib.suppress(ProcessLookupError):
            daemon.close()
