"""The demo's processes: a daemon of its own, and clients that it talks to line by line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, TypedDict, cast

from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.remote import RemoteRanks
from xdit_sidecar.protocol.errors import DaemonAbsent

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_TURN_SECONDS = 300  # of one step: the first has taken more than a minute on a loaded CPU


class DemoFailed(Exception):
    """The demo cannot go on; the text says why."""


class HandedOver(TypedDict):
    """What a client tells about one component. Sizes in bytes."""

    role: str
    seconds: float  # from opening the file to tensors
    weights_read: int
    process_read: int  # everything that the process read meanwhile, as the kernel counts it
    payload: int
    region: int
    address: int
    tensors: int
    outside: list[str]  # tensors that do not lie in the region


class Daemon:
    """``xdit-sidecar serve`` with its ranks, in a temporary runtime directory."""

    def __init__(self, device: str, ranks: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="xdit-demo-"))
        self.runtime_dir = self.directory / "run"
        self._log = self.directory / "daemon.log"
        command = [
            *(sys.executable, "-m", "xdit_sidecar.daemon", "serve"),
            *("--device", device, "--runtime-dir", str(self.runtime_dir)),
            *("--ranks", str(ranks), "--deadline", str(_TURN_SECONDS)),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        self.pid = self._process.pid

    def wait_until_ready(self) -> m.Status:
        """Its status as soon as every keeper is ready or has failed."""
        give_up = time.monotonic() + _START_SECONDS
        with Client(self.runtime_dir, name="demo") as client:
            while self._process.poll() is None and time.monotonic() < give_up:
                with contextlib.suppress(DaemonAbsent):
                    status = client.status()
                    if all(device.state != "starting" for device in status.devices):
                        return status
                time.sleep(0.02)
        raise DemoFailed(f"the daemon did not start; its log:\n{self.log}")

    def wait_for_ranks(self) -> None:
        """Return when they can work. Raises RanksUnavailable or DeadlineExceeded."""
        with Client(self.runtime_dir, name="demo") as client:
            RemoteRanks(client).wait_until_ready()

    def status(self) -> m.Status:
        """What it says of itself now."""
        with Client(self.runtime_dir, name="demo") as client:
            return client.status()

    @property
    def log(self) -> str:
        """The end of what it logged."""
        return self._log.read_text(errors="replace")[-4000:]

    def stop(self) -> tuple[int, list[str]]:
        """SIGTERM: its exit status, and the names of what it left in its runtime directory."""
        self._process.terminate()
        status = self._process.wait(_STOP_SECONDS)
        left = sorted(path.name for path in self.runtime_dir.iterdir())
        return status, left

    def close(self) -> None:
        """End it however it is, and remove its directory."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.directory)


class ClientProcess:
    """A process that runs ``demo_client.py``."""

    def __init__(self, daemon: Daemon, device: str, name: str) -> None:
        self.name = name
        command = [
            *(sys.executable, str(Path(__file__).with_name("demo_client.py"))),
            *("--runtime-dir", str(daemon.runtime_dir), "--device", device, "--name", name),
        ]
        # ComfyUI's default on CUDA: torch's own memory could not be shared under it.
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(allocator if device != "cpu" else {})},
        )
        self._input = cast(IO[str], self._process.stdin)
        self._output = cast(IO[str], self._process.stdout)
        self.pid = self._process.pid
        self._daemon = daemon

    def send(self, **command: object) -> None:
        """Give it a command; :meth:`receive` its answer."""
        self._input.write(json.dumps(command) + "\n")
        self._input.flush()

    def wait_until_ready(self) -> None:
        """Until it has imported torch and reached the daemon."""
        self.receive()

    def receive(self) -> Any:
        """Its next answer."""
        line = self._output.readline()
        if not line:
            status = self._process.wait(_STOP_SECONDS)
            raise DemoFailed(
                f"{self.name} ended with status {status}; the daemon's log:\n{self._daemon.log}"
            )
        return json.loads(line)

    def kill(self) -> None:
        """SIGKILL, as an out-of-memory killer would do it."""
        self._process.kill()
        if self._process.wait() != -signal.SIGKILL:
            raise DemoFailed(f"{self.name} had ended before it was killed")
        self.close()

    def stop(self) -> int:
        """Close its standard input and wait: its exit status."""
        self._input.close()
        try:
            return self._process.wait(_STOP_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """End it however it is. Safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._input, self._output):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
