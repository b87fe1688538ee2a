"""The stages of the soak: what each runs, and what it says of itself afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platforms
from broker.test_catalog_properties import run_in_any_order
from daemon_process import running_daemon
from hostile import siege
from hostile.attack import Attack
from hostile.catalogue import ATTACKS
from test_demo import check_demo

from soak import meaning_stages, rank_stages, stock_files, training
from soak.cycles import BUDGET, run_cycles

CYCLES = 10_000
ORDERS = 10_000
_SECONDS = 1_500.0  # a stage that takes longer has failed

Stage = Callable[[], dict[str, object]]


def cycles(name: str) -> dict[str, object]:
    """10,000 hand-over/attach/release cycles on one platform."""
    with tempfile.TemporaryDirectory() as directory:
        platform = platforms.make_platform(name, Path(directory))
        os.environ.update(platform.environment)
        with running_daemon(
            Path(directory), "--budget", str(BUDGET), device=platform.option
        ) as daemon:
            figures = run_cycles(daemon, platform.device, CYCLES, seconds=_SECONDS)
            assert daemon.stop() == 0
    return figures.to_json()


def attack(chosen: Attack) -> dict[str, object]:
    """One attack with its full count."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running_daemon(Path(directory)) as daemon,
    ):
        outcome = siege.besiege(daemon, chosen, chosen.count, seconds=_SECONDS)
        assert outcome.inputs >= chosen.count, f"only {outcome.inputs} inputs"
        assert daemon.stop() == 0
    return dict(outcome.to_json())


def orders(count: int = ORDERS) -> dict[str, object]:
    """Everything that can happen to a catalog, in so many random orders."""
    run_in_any_order(count, steps=100)
    return {"orders": count, "steps_each": 100}


def demo(name: str) -> dict[str, object]:
    """`make demo` twice on one platform; `make test` has it once, on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        check_demo(
            platforms.make_platform(name, Path(directory)), Path(directory, "cache"), times=2
        )
    return {"runs": 2}


#: Stages that measure no times, or wait most of theirs, the longest first: several run at once.
PATIENT = [*training.STAGES, *rank_stages.DEATHS, "ranks-exactness", *meaning_stages.STAGES]

STAGES: dict[str, Stage] = {
    "catalog-orders": orders,
    **{f"cycles-{name}": (lambda name=name: cycles(name)) for name in platforms.PLATFORMS},  # type: ignore[misc]
    **{f"hostile-{a.name}": (lambda a=a: attack(a)) for a in ATTACKS.values()},  # type: ignore[misc]
    **rank_stages.STAGES,
    **meaning_stages.STAGES,
    **stock_files.STAGES,
    **training.STAGES,
    **{f"demo-{name}": (lambda name=name: demo(name)) for name in platforms.PLATFORMS[1:]},  # type: ignore[misc]
}
