"""Forwards over 1, 2 and 4 ranks differ from one process by rounding alone, for every size."""

from __future__ import annotations

import importlib.util

import pytest
from ranks.parallel.exactness import BOUND, CONFIGS, measure, worst_ratios
from ranks.parallel.harness import Nursery

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed"
    ),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("ranks", CONFIGS)
def test_every_size_is_exact(nursery: Nursery, ranks: int) -> None:
    cases = measure(nursery, ranks, [ranks])
    worst = worst_ratios(cases)
    assert len(worst) == 2 * len(CONFIGS[ranks])
    assert max(worst.values()) <= BOUND, worst


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}], ids=["ulysses2", "ring2"])
def test_the_measure_fails_without_the_exchange(nursery: Nursery, degrees: dict[str, int]) -> None:
    lengths = [[64, 16], [63, 13], [25, 3]]
    more = {"configs": [degrees], "lengths": lengths, "batches": [1], "exchange": False}
    worst = worst_ratios(measure_apart(nursery, more))
    assert all(ratio > 5 * BOUND for ratio in worst.values()), worst


def measure_apart(nursery: Nursery, more: dict[str, object]) -> list[dict[str, object]]:
    # Even the outputs of the ranks differ then.
    outcomes = nursery.run("measure_errors", 2, seeds=[1], **more)
    return [case for outcome in outcomes for case in outcome.get()["cases"]]
