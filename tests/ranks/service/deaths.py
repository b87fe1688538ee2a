"""Signal × target × phase: who dies or hangs at which moment, and what was promised for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import pytest
from flux_inputs import comfy_inputs
from hostile import vitals
from ranks.service.phases import Background, Clients
from ranks_scene import LARGE, RanksScene, is_alive, maps, wait_until
from xdit_sidecar.protocol.errors import DaemonAbsent, DaemonLost, DeadlineExceeded, RankLost

DEADLINE = 6.0  # seconds for a turn, and for an exchange among the ranks
TOLD = {signal.SIGKILL: 2.0, signal.SIGSTOP: DEADLINE + 2.0}  # seconds until a client knows
LATE = 10  # times that: a machine may be busy, a client that hangs is another thing
_KEEPER_SECONDS = 30.0  # a keeper is asked every 2 s and has 10 s to answer
_PAUSE = 1.5  # seconds that a broker stands still
_SETTLE_SECONDS = 20.0

# "waiting": a picture was begun and has no turn, which is nothing to keepers and brokers.
PHASES = ("idle", "loading", "forward", "decode", "waiting")


@dataclass(frozen=True)
class Death:
    """One row: SIGKILL or SIGSTOP, for "rank 0", "rank 1", "keeper" or "broker", in a phase."""

    signal: signal.Signals
    target: str
    phase: str

    def __str__(self) -> str:
        return f"{self.signal.name} {self.target}, {self.phase}"

    def happen(self, clients: Clients) -> float:
        """Seconds until those who had work in the ranks were told; 0.0 if nobody had to be."""
        try:
            match self.target, self.signal:
                case "keeper", _:
                    return _lose_keeper(clients, self)
                case "broker", signal.SIGKILL:
                    return _lose_broker(clients, self)
                case "broker", _:
                    return _pause_broker(clients, self)
                case _:
                    return _lose_rank(clients, self, int(self.target[-1]))
        finally:
            clients.finish()


def rows(phase: str) -> list[Death]:
    """All of a phase, in an order that the daemon stands.

    A keeper that fails a third time, each within 30 s, is given up; the death of the broker after
    the second one begins a new row.
    """
    if phase == "waiting":
        return [Death(signal.SIGKILL, f"rank {rank}", phase) for rank in range(2)]
    return [
        Death(how, target, phase)
        for target in ("keeper", "broker", "rank 0", "rank 1")
        for how in (signal.SIGSTOP, signal.SIGKILL)
    ]


# --- what was promised


def _lose_rank(clients: Clients, row: Death, rank: int) -> float:
    """All ranks are new, clients were told and are served again, on the same sessions."""
    scene = clients.scene
    sessions, starts, pids = clients.sessions, scene.starts, scene.rank_pids
    works = clients.begin(row.phase, rank)
    os.kill(pids[rank], row.signal)
    struck = time.monotonic()
    if row.phase == "idle" and row.signal == signal.SIGSTOP:  # nobody knows until there is work
        works = [Background(lambda: clients.user.forward(comfy_inputs(LARGE)))]
    for work in works:
        work.join(LATE * TOLD[row.signal])
        assert isinstance(work.error, RankLost), (row, work.error)
        assert work.error.retryable
    scene.wait_until_ready(starts + 1)
    assert scene.starts == starts + 1, scene.daemon.log
    assert not any(map(is_alive, pids)), "a rank of the old group is left"
    assert scene.status.ranks[0].error is None
    clients.check()
    assert clients.sessions == sessions
    return max((work.ended - struck for work in works), default=0.0)


def _lose_keeper(clients: Clients, row: Death) -> float:
    """Who has mapped a region goes on; renewed, a new one is used and the old one goes."""
    scene = clients.scene
    sessions, pids, keeper = clients.sessions, scene.rank_pids, keeper_pid(scene)
    works = clients.begin(row.phase)
    os.kill(keeper, row.signal)
    clients.filled.set()
    for work in works:
        work.check_output()
    clients.renew(_KEEPER_SECONDS)
    assert not is_alive(keeper)
    scene.daemon.wait_for_status(
        lambda s: s.devices[0].orphaned == 0 and all(c.state == "resident" for c in s.components)
    )
    clients.check()
    assert (scene.rank_pids, clients.sessions) == (pids, sessions)
    return 0.0


def _lose_broker(clients: Clients, row: Death) -> float:
    """Ranks and keepers die with it, clients are told; a new one serves them again."""
    daemon, family = clients.scene.daemon, children(clients.scene)
    works = clients.begin(row.phase)
    os.kill(daemon.pid, signal.SIGKILL)
    struck = time.monotonic()
    clients.filled.set()
    wait_until(lambda: not any(map(is_alive, family)), 10, "children outlive the broker")
    assert daemon.process is not None
    daemon.process.wait(10)
    filling = row.phase == "loading"  # a hand-over waits a moment for another daemon
    told = 0.0 if filling else _told(works, struck)
    daemon.start()
    clients.scene.wait_until_ready()
    for work in works if filling else ():
        work.join(LATE * TOLD[signal.SIGKILL])
        assert work.output is not None or isinstance(work.error, DaemonLost | DaemonAbsent)
    clients.renew()
    clients.check()
    return told


def _told(works: Sequence[Background], struck: float) -> float:
    for work in works:
        work.join(LATE * TOLD[signal.SIGKILL])
        assert isinstance(work.error, DaemonLost), work.error
        assert work.error.retryable
    return max((work.ended - struck for work in works), default=0.0)


def _pause_broker(clients: Clients, row: Death) -> float:
    """Questions end at their own time; when it goes on, so does everything that was begun."""
    scene = clients.scene
    before = clients.sessions, scene.rank_pids, keeper_pid(scene)
    works = clients.begin(row.phase)
    os.kill(scene.daemon.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            clients.user.client.ping(timeout=_PAUSE)
        assert time.monotonic() - began < _PAUSE + 1.0
    finally:
        os.kill(scene.daemon.pid, signal.SIGCONT)
    clients.filled.set()
    for work in works:
        work.check_output()
    clients.check()
    assert (clients.sessions, scene.rank_pids, keeper_pid(scene)) == before
    return 0.0


# --- what is left


@dataclass(frozen=True)
class Footprint:
    """What daemon and client hold, by its name; no more of anything after the last death."""

    counts: dict[str, int]
    files: list[str]  # in the runtime directory

    @classmethod
    def of(cls, scene: RanksScene) -> Footprint:
        """Once everything has come to rest."""
        status = scene.daemon.wait_for_status(
            lambda s: s.group.jobs == 0 and all(c.state == "resident" for c in s.components), 60
        )
        pids = {
            "broker": scene.daemon.pid,
            "keeper": keeper_pid(scene),
            **{f"rank {rank}": pid for rank, pid in enumerate(scene.rank_pids)},
            "client": os.getpid(),
        }
        counts = {
            "processes": vitals.steady(lambda: len(children(scene))),
            "components": len(status.components),
            "bytes of regions": status.devices[0].regions + status.devices[0].orphaned,
            "sessions": vitals.steady(lambda: len(scene.status.sessions)),
        }
        for name, pid in pids.items():
            counts[f"descriptors of the {name}"] = vitals.steady(
                lambda pid=pid: vitals.descriptors(pid)  # type: ignore[misc]
            )
            counts[f"maps of the {name}"] = vitals.steady(lambda pid=pid: maps(pid))  # type: ignore[misc]
        return cls(counts, sorted(path.name for path in scene.daemon.runtime_dir.iterdir()))

    def check(self, scene: RanksScene) -> None:
        """AssertionError if there is more of anything now."""
        until = time.monotonic() + _SETTLE_SECONDS
        while (leaked := self._more(now := Footprint.of(scene))) and time.monotonic() < until:
            time.sleep(0.5)  # nobody waits for what is evicted soon
        assert not leaked, f"left behind: {leaked}"
        assert now.files == self.files

    def _more(self, now: Footprint) -> dict[str, int]:
        more = {name: n - self.counts[name] for name, n in now.counts.items()}
        return {name: count for name, count in more.items() if count > 0}


def keeper_pid(scene: RanksScene) -> int:
    (pid,) = [device.keeper_pid for device in scene.status.devices]
    assert pid
    return pid


def children(scene: RanksScene) -> list[int]:
    """Every process that came from the broker."""
    return [child.pid for child in psutil.Process(scene.daemon.pid).children(recursive=True)]
