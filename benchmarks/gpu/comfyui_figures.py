"""What the cases of the stage ``comfyui`` come to: a figure for each target that they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import targets
from figures import Figure

Case = Mapping[str, Any]


def figures_of(cases: Iterable[Case]) -> list[Figure]:
    """The worst of all cases; nothing about what none of them has got to."""
    cases = list(cases)
    figures = []
    seconds = [case["seconds"].get("loaders after a restart") for case in cases]
    if known := [each for each in seconds if each is not None]:
        figures.append(targets.LOADERS.measured(max(known)))
        said = [line for case in cases for line in case.get("said after a restart", [])]
        figures.append(targets.LOADERS_READ.measured(sum(", read " in line for line in said)))
    if copies := [found for case in cases if (found := _copies(case)) is not None]:
        figures.append(targets.COPIES_IN_COMFYUI.measured(max(copies)))
    return figures


def _copies(case: Case) -> float | None:
    """The keeper's growth and what ComfyUI holds outside of regions, in the components' bytes."""
    memory = case["memory"]
    try:
        before, after = memory["ready, nothing loaded"], memory["after two prompts"]
        grown = after["processes"]["keeper"] - before["processes"]["keeper"]
        probe = case["probe"]["probe"]
    except (KeyError, TypeError):  # no GPU, a driver that does not tell, or a case that failed
        return None
    outside = sum(probe[name]["outside"][1] for name in ("clip", "vae"))
    return float(grown + outside) / sum(after["components"].values())
