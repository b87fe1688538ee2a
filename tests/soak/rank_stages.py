"""The ranks over a long time: forwards without end, cancellations, deaths and hangs."""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import leaks
from ranks.parallel.exactness import measure_drifts, run_soak
from ranks.parallel.harness import Nursery
from ranks.service import deaths
from ranks.service.phases import Clients
from ranks.service.test_cancelling import cancel_at_random
from ranks.service.test_growth import forward_often
from ranks_scene import RanksScene, running_ranks

FORWARDS = 10_000
CANCELS = 1_000
TIMES = 10  # each death
SEEDS = 50
_GROWTH = 16 << 20  # bytes that a process may grow by after a fifth of the forwards: 2 KiB each
_DEARER = 1.2  # times the CPU seconds, at the end
_SLOWER = 1.5  # times, on a machine that does other things as well

Figures = dict[str, object]


def forwards(count: int = FORWARDS) -> Figures:
    """So many forwards: nothing grows, neither in time nor in memory."""
    with _scene() as scene, scene.user() as user:
        often = forward_often(scene, user, count)
        assert often.computed[-1] < _DEARER * often.computed[0], often
        assert often.medians[-1] < _SLOWER * often.medians[0], often
        assert max(often.grown.values()) < _GROWTH, often
        assert scene.starts == 1
    return {
        "forwards": count,
        "median_ms": [round(median * 1e3, 2) for median in often.medians],
        "cpu_seconds": [round(seconds, 2) for seconds in often.computed],
        "private_bytes_grown": often.grown,
    }


def cancels() -> Figures:
    """Forwards given up at random moments: no hang, no restart."""
    with _scene() as scene:
        finished = cancel_at_random(scene, CANCELS)
    return {"cancelled": CANCELS - finished, "finished_before": finished}


def die(phase: str, times: int = TIMES) -> Figures:
    """Each signal for each target in this phase: recovered, told in time, nothing left behind."""
    told: dict[str, list[float]] = defaultdict(list)
    before = leaks.Snapshot.take()
    with _scene("--deadline", str(deaths.DEADLINE)) as scene, Clients.of(scene) as clients:
        footprint = None
        for _ in range(times):
            for death in deaths.rows(phase):
                took = death.happen(clients)
                assert took < deaths.TOLD[death.signal], f"{death}: told after {took:.1f} s"
                told[f"{death.signal.name} {death.target}"].append(took)
            # After the first round: clients keep the connections that they once needed.
            footprint = footprint or deaths.Footprint.of(scene)
        assert footprint is not None
        footprint.check(scene)
        assert "Traceback" not in scene.daemon.log, scene.daemon.log[-3000:]
    assert not (left := leaks.find_leaks(before)), left
    return {
        "times_each": times,
        "deadline_seconds": deaths.DEADLINE,
        "told_after_seconds_at_most": {name: round(max(took), 2) for name, took in told.items()},
    }


def exactness() -> Figures:
    """Errors against fp64, as ratios to the single process's own, over many seeds."""
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Nursery(Path(directory, "nursery"), loaded=True)) as nursery,
    ):
        worst = run_soak(nursery, seeds=SEEDS)
        drifts = {name: round(drift, 4) for name, drift in measure_drifts(nursery).items()}
    return {"seeds": SEEDS, "worst_ratios": worst, "pipefusion_drift": drifts}


@contextlib.contextmanager
def _scene(*options: str) -> Iterator[RanksScene]:
    """A daemon with two ranks in a directory of its own."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running_ranks(Path(directory, "scene"), 2, *options) as scene,
    ):
        yield scene


DEATHS = {f"ranks-die-{phase}": (lambda phase=phase: die(phase)) for phase in deaths.PHASES}

STAGES = {
    "ranks-forwards": forwards,
    "ranks-cancels": cancels,
    **DEATHS,
    "ranks-exactness": exactness,
}
