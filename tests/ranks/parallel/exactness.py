"""The judgement on forwards over several ranks: no worse than twice one process's rounding."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from ranks.parallel.harness import Nursery, values

BOUND = 2.0  # times the error of plain diffusers in the same dtype, both against fp64
# Ranks → configs that they form.
CONFIGS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}],
    4: [
        {"ulysses": 2, "ring": 2},
        {"ulysses": 4},
        {"ulysses": 2, "cfg": 2},
        {"ring": 2, "cfg": 2},
    ],
}
# Image and text tokens; the first divides by all degrees, the last are extremes.
LENGTHS = [[64, 16], [63, 16], [64, 15], [63, 13], [25, 3], [1, 16], [64, 1], [1, 1]]
BATCHES = [1, 2, 3]
# Runs of PipeFusion: ranks, and the arguments of `rank_tasks.run_pipefusion`.
PIPEFUSION: dict[str, tuple[int, dict[str, Any]]] = {
    name: (ranks, {"degrees": degrees, "image": i, "text": t, "rows": r, "patches": p})
    for name, ranks, degrees, i, t, r, p in (
        ("2 stages", 2, {"pipefusion": 2}, 64, 16, 1, 2),
        ("4 patches", 2, {"pipefusion": 2}, 63, 13, 2, 4),
        ("4 stages", 4, {"pipefusion": 4}, 25, 3, 1, 0),
        ("2 stages and cfg", 4, {"pipefusion": 2, "cfg": 2}, 25, 13, 3, 3),
    )
}


def measure(nursery: Nursery, ranks: int, seeds: list[int], **more: Any) -> list[dict[str, Any]]:
    """Every case on so many ranks: `rank_tasks.measure_errors`. All ranks' outputs are equal."""
    arguments = {"configs": CONFIGS[ranks], "lengths": LENGTHS, "batches": BATCHES, **more}
    limit = 120.0 + 60.0 * len(seeds)
    found = values(nursery.run("measure_errors", ranks, limit=limit, seeds=seeds, **arguments))
    for other in found[1:]:
        assert other["outputs"] == found[0]["outputs"], "ranks have different outputs"
    return [case for rank in found for case in rank["cases"]]


def worst_ratios(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Per config and dtype the largest error as a multiple of one process's; inf for NaN.

    Errors are RMS over the seeds of a case: config, dtype, lengths and rows.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[tuple(str(case[k]) for k in ("config", "dtype", "lengths", "rows"))].append(case)
    worst: dict[str, float] = defaultdict(float)
    for (config, dtype, *_), members in groups.items():
        error, alone = (math.fsum(m[name] ** 2 for m in members) for name in ("error", "alone"))
        ratio = math.inf if any(m["nan"] for m in members) else math.sqrt(error / alone)
        worst[f"{config} {dtype}"] = max(worst[f"{config} {dtype}"], ratio)
    return dict(worst)


def drift(found: dict[str, Any]) -> tuple[float, float]:
    """Largest error of stale steps relative to the output, and that of steps that hardly move."""
    return max(found["errors"][1:]), max(found["slow_errors"][1:])


def measure_drifts(nursery: Nursery) -> dict[str, float]:
    """`drift` of each run of PipeFusion; AssertionError if it is that of no update at all."""
    drifts = {}
    for name, (ranks, arguments) in PIPEFUSION.items():
        first, *_ = values(nursery.run("run_pipefusion", ranks, **arguments))
        drifts[name], _ = drift(first)
        assert drifts[name] < first["no_update"], (name, drifts[name], first["no_update"])
    return drifts


def run_soak(nursery: Nursery, seeds: int = 50, step: int = 5) -> dict[str, float]:
    """`worst_ratios` over that many seeds and all rank counts; AssertionError beyond the bound."""
    cases = []
    for ranks in CONFIGS:
        for first in range(0, seeds, step):
            cases += measure(nursery, ranks, list(range(first, min(first + step, seeds))))
    worst = worst_ratios(cases)
    assert max(worst.values()) <= BOUND, worst
    return worst
