"""The ranks over a long time: forwards without end, cancellations, deaths and hangs."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from ranks.parallel.exactness import run_soak
from ranks.parallel.harness import Nursery
from ranks.service import test_rank_failures as failures
from ranks.service.test_cancelling import cancel_at_random
from ranks_scene import LARGE, RanksScene, running_ranks, some_inputs

FORWARDS = 10_000
CANCELS = 1_000
TIMES = 10  # each death, for each rank
SEEDS = 50
_WINDOW = 1_000  # forwards compared at both ends
_GROWTH = 64 << 20  # bytes that allocators may keep more
_SLOWER = 1.5  # times, on a machine that does other things as well

Figures = dict[str, object]


def forwards() -> Figures:
    """So many forwards: nothing grows, neither in time nor in memory."""
    with _scene() as scene, scene.user() as user:
        inputs, times, memory = some_inputs(), [], []
        for number in range(FORWARDS):
            began = time.perf_counter()
            user.forward(inputs)
            times.append(time.perf_counter() - began)
            if number in (_WINDOW, FORWARDS - 1):
                pids = [scene.daemon.pid, *scene.rank_pids]
                memory.append([psutil.Process(pid).memory_full_info().uss for pid in pids])
        first, last = (statistics.median(part) for part in (times[:_WINDOW], times[-_WINDOW:]))
        growth = [after - before for before, after in zip(*memory, strict=True)]
        assert last < _SLOWER * first, (first, last)
        assert max(growth) < _GROWTH, growth
        assert scene.starts == 1
    return {
        "forwards": FORWARDS,
        "median_ms_first": round(first * 1e3, 2),
        "median_ms_last": round(last * 1e3, 2),
        "private_bytes_grown": growth,
    }


def cancels() -> Figures:
    """Forwards given up at random moments: no hang, no restart."""
    with _scene() as scene:
        finished = cancel_at_random(scene, CANCELS)
    return {"cancelled": CANCELS - finished, "finished_before": finished}


def kills() -> Figures:
    """Each rank killed while idle and while computing, and each keeper, ten times."""
    told = []
    with _scene("--deadline", "30") as scene, scene.user(scene.file("large", LARGE)) as user:
        for _ in range(TIMES):
            for rank in range(2):
                failures.kill_while_idle(scene, user, rank)
                told.append(failures.kill_while_computing(scene, user, rank))
            failures.kill_keeper(scene, user, computing=True)
            failures.kill_keeper(scene, user, computing=False)
    return {"deaths_while_computing": len(told), "told_after_seconds_at_most": round(max(told), 2)}


def hangs() -> Figures:
    """Each rank stopped with SIGSTOP, ten times."""
    told = []
    options = ("--deadline", str(failures.DEADLINE))
    with _scene(*options) as scene, scene.user(scene.file("large", LARGE)) as user:
        for _ in range(TIMES):
            for rank in range(2):
                told.append(failures.stop_while_computing(scene, user, rank))
    return {
        "hangs": len(told),
        "deadline_seconds": failures.DEADLINE,
        "told_after_seconds_at_most": round(max(told), 2),
    }


def brokers() -> Figures:
    """The broker killed, and stopped in the middle of a forward, ten times each."""
    for _ in range(TIMES):
        with _scene() as scene:
            failures.kill_broker(scene)
        with _scene() as scene, scene.user(scene.file("large", LARGE)) as user:
            failures.stop_while_it_computes(scene, user)
    return {"killed": TIMES, "stopped": TIMES}


def exactness() -> Figures:
    """Errors against fp64, as ratios to the single process's own, over many seeds."""
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Nursery(Path(directory, "nursery"), loaded=True)) as nursery,
    ):
        worst = run_soak(nursery, seeds=SEEDS)
    return {"seeds": SEEDS, "worst_ratios": worst}


@contextlib.contextmanager
def _scene(*options: str) -> Iterator[RanksScene]:
    """A daemon with two ranks in a directory of its own."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running_ranks(Path(directory, "scene"), 2, *options) as scene,
    ):
        yield scene


STAGES = {
    "ranks-forwards": forwards,
    "ranks-cancels": cancels,
    "ranks-kills": kills,
    "ranks-hangs": hangs,
    "ranks-brokers": brokers,
    "ranks-exactness": exactness,
}
