"""Eight client processes that share components, killed and stopped at random; nothing may leak."""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from daemon_process import DaemonProcess
from hostile import vitals
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol import messages as m

WORKERS = 8
CYCLES_PER_UPSET = 20  # on average, of all workers together
BUDGET = 24 * limits.MIB  # 12 regions for 20 components: some are evicted for room
# How much a process may have grown between the end of warming up and the end.
FLAT = 8 * limits.MIB
_PROGRAM = Path(__file__).with_name("worker.py")


@dataclass
class Figures:
    """Sizes in bytes, times in seconds; memory and descriptors by process."""

    cycles: int = 0
    seconds: float = 0.0
    kills: int = 0
    stops: int = 0
    results: dict[str, int] = field(default_factory=dict)
    rss_warm: dict[str, int] = field(default_factory=dict)
    rss_end: dict[str, int] = field(default_factory=dict)
    descriptors_warm: dict[str, int] = field(default_factory=dict)
    descriptors_end: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class Herd:
    """The workers; killed ones are replaced."""

    def __init__(self, daemon: DaemonProcess, device: str, chance: random.Random) -> None:
        self._daemon = daemon
        self._device = device
        self._random = chance
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._resume: dict[int, float] = {}  # worker -> when to continue it
        self._said: dict[int, bytes] = {}  # descriptor -> a line that is not complete
        self.results: Counter[str] = Counter()
        self.kills = self.stops = 0

    def start(self, number: int) -> None:
        """Start a worker, or its successor."""
        arguments = [str(self._daemon.runtime_dir), self._device, str(number)]
        worker = subprocess.Popen(
            [sys.executable, str(_PROGRAM), *arguments, str(self._random.getrandbits(32))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert worker.stdout is not None
        os.set_blocking(worker.stdout.fileno(), False)
        self._workers[number] = worker
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def run(self, cycles: int, seconds: float) -> None:
        """Until that many cycles are done; AssertionError if that takes too long."""
        target, end = self.results.total() + cycles, time.monotonic() + seconds
        upset = self.results.total() + WORKERS
        while self.results.total() < target:
            assert time.monotonic() < end, f"only {self.results.total()} of {target} cycles"
            self._read(0.005)
            self._continue(time.monotonic())
            if self.results.total() >= upset:
                self._upset()
                upset = self.results.total() + self._random.randint(1, 2 * CYCLES_PER_UPSET)

    def finish(self) -> None:
        """Continue all, let them end by themselves, reap them."""
        self._continue(float("inf"))
        for worker in self._workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
        end = time.monotonic() + 60
        while any(worker.poll() is None for worker in self._workers.values()):
            self._read(0.02)
            assert time.monotonic() < end, "a worker did not end"
        self._read(0)
        for worker in self._workers.values():
            assert worker.returncode == 0, f"a worker ended with {worker.returncode}"
            self._forget(worker)
        self._workers.clear()

    def close(self) -> None:
        """End whatever is left."""
        for worker in self._workers.values():
            worker.kill()
            worker.wait()
            self._forget(worker)
        self._selector.close()

    def _upset(self) -> None:
        number = self._random.randrange(WORKERS)
        worker = self._workers[number]
        if self._random.random() < 0.4:
            assert worker.poll() is None, f"a worker ended by itself: {worker.returncode}"
            worker.kill()
            worker.wait()
            self.kills += 1
            self._read(0)
            self._forget(worker)
            self._resume.pop(number, None)
            self.start(number)
        elif number not in self._resume:
            worker.send_signal(signal.SIGSTOP)
            self.stops += 1
            self._resume[number] = time.monotonic() + self._random.uniform(0.01, 0.3)

    def _continue(self, now: float) -> None:
        for number, at in list(self._resume.items()):
            if now >= at:
                self._workers[number].send_signal(signal.SIGCONT)
                del self._resume[number]

    def _read(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fileobj)
            *complete, self._said[key.fd] = (self._said.get(key.fd, b"") + data).split(b"\n")
            lines = [line.decode() for line in complete]
            self.results.update(lines)
            wrong = [line for line in lines if line.startswith("wrong")]
            assert not wrong, f"a worker read other bytes than were written: {wrong}"

    def _forget(self, worker: subprocess.Popen[bytes]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        self._said.pop(worker.stdout.fileno(), None)
        if worker.stdout in self._selector.get_map():
            self._selector.unregister(worker.stdout)
        worker.stdin.close()
        worker.stdout.close()


def run_cycles(
    daemon: DaemonProcess, device: str, cycles: int, *, seed: int = 0, seconds: float = 100.0
) -> Figures:
    """A warm-up of a quarter of the cycles, then the rest; AssertionError if anything leaked."""
    figures = Figures()
    chance = random.Random(seed)
    began = time.monotonic()
    for phase in (cycles // 4, cycles - cycles // 4):
        herd = Herd(daemon, device, chance)
        try:
            for number in range(WORKERS):
                herd.start(number)
            herd.run(phase, seconds)
            herd.finish()
        finally:
            herd.close()
        figures.kills += herd.kills
        figures.stops += herd.stops
        figures.results = dict(Counter(figures.results) + herd.results)
        processes = clean(daemon)
        rss = {name: vitals.memory(pid) for name, pid in processes.items()}
        fds = {
            name: vitals.steady(lambda pid=pid: vitals.descriptors(pid))  # type: ignore[misc]
            for name, pid in processes.items()
        }
        if not figures.rss_warm:
            figures.rss_warm, figures.descriptors_warm = rss, fds
        figures.rss_end, figures.descriptors_end = rss, fds
    figures.cycles = sum(figures.results.values())
    figures.seconds = round(time.monotonic() - began, 2)
    check(daemon, figures)
    return figures


def clean(daemon: DaemonProcess) -> dict[str, int]:
    """Evict everything; nothing may be in the way. Pids of the broker and the keepers."""

    def idle(status: m.Status) -> bool:
        return (
            len(status.sessions) == 1
            and not any(c.sessions for c in status.components)
            and all(c.state == "resident" for c in status.components)
        )

    status = daemon.wait_for_status(idle)
    with daemon.client("cleaner") as client:
        for component in status.components:
            client.evict(component.fingerprint, component.device)
        status = client.status()
    assert not status.components
    assert all(d.regions == 0 and d.orphaned == 0 and d.keeper_starts == 1 for d in status.devices)
    keepers = {f"keeper {d.kind} {n}": d.keeper_pid or 0 for n, d in enumerate(status.devices)}
    return {"broker": daemon.pid, **keepers}


def check(daemon: DaemonProcess, figures: Figures) -> None:
    """No process, socket file, descriptor or memory more than after the warm-up."""
    children = [child.pid for child in psutil.Process(daemon.pid).children(recursive=True)]
    assert len(children) == len(figures.rss_end) - 1, f"processes are left: {children}"
    files = sorted(path.name for path in daemon.runtime_dir.iterdir())
    assert files == ["bulk.sock", "control.sock", "daemon.lock", "session.sock"]
    for name, warm in figures.rss_warm.items():
        grown = figures.rss_end[name] - warm
        assert grown <= FLAT, f"the {name} grew by {grown} bytes"
        more = figures.descriptors_end[name] - figures.descriptors_warm[name]
        assert more <= 0, f"the {name} has {more} more descriptors"
    assert "Traceback" not in daemon.log, daemon.log[-3000:]
    done = figures.results
    for wanted in ("filled", "shared", "attached", "abandoned", "evicted"):
        assert done.get(wanted), f"nothing was {wanted}: {done}"
