"""A daemon's vital signs: memory, descriptors, and how fast it answers an honest client."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daemon_process import DaemonProcess
from xdit_sidecar.protocol.errors import SidecarError

_KIB = 1024


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes, from /proc/<pid>/status: VmRSS now, VmHWM at its highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * _KIB
    raise AssertionError(f"process {pid} has no {field}")


def reset_peak(pid: int) -> None:
    """Let VmHWM start again from what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def descriptors(pid: int) -> int:
    """How many the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def settle(read: Callable[[], int], bound: int, seconds: float = 15.0) -> int:
    """``read()`` once it is at most ``bound``, or what it still is after ``seconds``."""
    end = time.monotonic() + seconds
    while (found := read()) > bound and time.monotonic() < end:
        time.sleep(0.05)
    return found


def steady(read: Callable[[], int], seconds: float = 0.5) -> int:
    """``read()`` once it has not fallen for a while: what just ended may still be closing."""
    lowest, since = read(), time.monotonic()
    while time.monotonic() - since < seconds:
        if (found := read()) < lowest:
            lowest, since = found, time.monotonic()
        time.sleep(0.02)
    return lowest


class Pinger:
    """An honest client that pings all the time; ``with`` it."""

    TIMEOUT = 5.0

    def __init__(self, daemon: DaemonProcess, pause: float = 0.005) -> None:
        self._daemon = daemon
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ping, name="pinger")
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def _ping(self) -> None:
        with self._daemon.client("pinger") as client:
            while not self._stop.wait(self._pause):
                began = time.monotonic()
                try:
                    client.ping(timeout=self.TIMEOUT)
                except SidecarError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.seconds.append(time.monotonic() - began)

    def percentile(self, percent: float) -> float:
        """Of all pings, in seconds; one that failed counts with the time it took."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def __enter__(self) -> Pinger:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
