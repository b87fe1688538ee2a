"""How long the daemon takes to start and to stop, and what it weighs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from daemon_process import DaemonProcess
from figures import Figure, percentile

ROUNDS = 5


def measure() -> list[Figure]:
    """From exec to an answer with a ready device; from SIGTERM to the exit."""
    starts, stops, weights = [], [], []
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        for _ in range(ROUNDS):
            daemon = DaemonProcess(Path(directory))
            try:
                began = time.perf_counter()
                daemon.start()
                starts.append(time.perf_counter() - began)
                status = Path(f"/proc/{daemon.pid}/status").read_text()
                weights.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
                began = time.perf_counter()
                daemon.stop()
                stops.append(time.perf_counter() - began)
            finally:
                daemon.close()
    return [
        Figure("daemon start to ready p50", percentile(starts, 50), "s", 2.0),
        Figure("daemon stop p50", percentile(stops, 50), "s", 10.0),
        Figure("broker resident memory", max(weights) / 2**20, "MiB"),
    ]
