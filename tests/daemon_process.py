"""A real daemon for tests: the ``serve`` command in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fork_server import Process, start_python
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.errors import DaemonAbsent

START_SECONDS = 30.0
STOP_SECONDS = 15.0
#: What the commands import, without torch.
COMMANDS = ("xdit_sidecar.daemon.commands.app", "xdit_sidecar.daemon.serve")


def daemon_environment() -> dict[str, str]:
    """This environment for a daemon without ranks."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "XDIT_SIDECAR_RANKS": "0",
    }
    return {**os.environ, **defaults}


class DaemonProcess:
    """``xdit-sidecar serve`` with its runtime directory, log and environment.

    ``options`` are appended to the command line; ``environment`` is added to this process's.
    There are no ranks unless the options ask for them: their imports take the cores of tests.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        device: str = "cpu",
        environment: dict[str, str] | None = None,
    ) -> None:
        # Unix socket paths are short; pytest's temporary directories are not always.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="xs-", dir="/tmp"))
        self.log_path = directory / "daemon.log"
        self._command = [
            *(sys.executable, "-m", "xdit_sidecar.daemon", "serve"),
            *("--device", device, "--runtime-dir", str(self.runtime_dir), *options),
        ]
        self._environment = {**daemon_environment(), **(environment or {})}
        self.process: Process | None = None

    def start(self) -> DaemonProcess:
        """Start it (again) and wait until the broker answers and its keepers are settled."""
        with self.log_path.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), 1, log.fileno())
            self.process = start_python("command", self._command[1:], self._environment, streams)
        deadline = time.monotonic() + START_SECONDS
        with self.client("starter") as client:
            while True:
                try:
                    if all(d.state != "starting" for d in client.status().devices):
                        return self
                except DaemonAbsent:
                    pass
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the daemon did not start:\n{self.log}")
                time.sleep(0.02)

    def client(self, name: str = "test", **options: object) -> Client:
        """A client of this daemon; close it."""
        return Client(self.runtime_dir, name=name, **options)  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything it logged so far."""
        return self.log_path.read_text()

    def wait_for_log(self, text: str, seconds: float = 10.0) -> str:
        """The first log line that contains ``text``."""
        deadline = time.monotonic() + seconds
        while True:
            for line in self.log.splitlines():
                if text in line:
                    return line
            assert time.monotonic() < deadline, f"{text!r} was not logged:\n{self.log}"
            time.sleep(0.02)

    def wait_for_status(self, condition, seconds: float = 10.0) -> m.Status:
        """The first status for which ``condition`` holds."""
        deadline = time.monotonic() + seconds
        with self.client("watcher") as client:
            while not condition(status := client.status()):
                assert time.monotonic() < deadline, f"never so: {status}"
                time.sleep(0.02)
        return status

    def stop(self) -> int:
        """SIGTERM, wait, exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def close(self) -> None:
        """End it however it is and remove its directory."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for path in self.runtime_dir.iterdir():
            path.unlink()
        self.runtime_dir.rmdir()


@contextlib.contextmanager
def running_daemon(
    directory: Path,
    *options: str,
    device: str = "cpu",
    environment: dict[str, str] | None = None,
) -> Iterator[DaemonProcess]:
    """A started daemon for the length of the block."""
    daemon = DaemonProcess(directory, *options, device=device, environment=environment)
    try:
        yield daemon.start()
    finally:
        daemon.close()
