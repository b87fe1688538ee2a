"""Forward after forward: nothing grows. The soak run does a hundred times as many."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import psutil
from ranks_scene import RanksScene, User, some_inputs

FORWARDS = 100
GROWTH = 16 << 20  # bytes that allocators may still take; one latent of each forward is 25 MiB


@dataclass(frozen=True)
class Often:
    """What so many forwards came to, after the first fifth."""

    medians: list[float]  # seconds a forward, of each further tenth
    computed: list[float]  # CPU seconds of broker and ranks, the same
    grown: dict[str, int]  # private bytes of each process


def forward_often(scene: RanksScene, user: User, count: int) -> Often:
    """So many forwards, one after another."""
    inputs, times = some_inputs(), []
    medians: list[float] = []
    computed: list[float] = []
    before: dict[str, int] = {}
    since = computed_seconds(scene)
    for number in range(1, count + 1):
        began = time.perf_counter()
        user.forward(inputs)
        times.append(time.perf_counter() - began)
        if number % (count // 10):
            continue
        now = computed_seconds(scene)
        medians.append(statistics.median(times))
        computed.append(now - since)
        times, since = [], now
        if len(medians) == 2:
            before = private_bytes(scene)
    grown = {name: nbytes - before[name] for name, nbytes in private_bytes(scene).items()}
    return Often(medians[2:], computed[2:], grown)


def processes(scene: RanksScene) -> dict[str, psutil.Process]:
    """The broker and the ranks."""
    pids = {f"rank {rank}": pid for rank, pid in enumerate(scene.rank_pids)}
    pids["broker"] = scene.daemon.pid
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def private_bytes(scene: RanksScene) -> dict[str, int]:
    return {name: process.memory_full_info().uss for name, process in processes(scene).items()}


def computed_seconds(scene: RanksScene) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes(scene).values())


def test_forwards_leave_nothing_behind(scene: RanksScene, user: User) -> None:
    often = forward_often(scene, user, FORWARDS)
    assert max(often.grown.values()) < GROWTH, often
