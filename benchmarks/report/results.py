"""The recorded results, and what they say about each target."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure
from targets import Target

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A target and the figure that shows it; none where nobody measured it yet."""

    target: Target
    figure: Figure | None

    @property
    def share(self) -> float | None:
        """How much of what is allowed is used: 1 at the limit, more beyond it. None: no figure."""
        if self.figure is None:
            return None
        used, allowed = self.figure.value, self.target.limit
        if self.target.at_least:
            used, allowed = allowed, used
        if used <= 0:
            return 0.0
        return used / allowed if allowed > 0 else float("inf")


def read_results(directory: Path) -> dict[str, Result]:
    """Name of the file without its ending → what ``gpu-*.json`` has."""
    return {
        path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("gpu-*.json"))
    }


def judge(targets: Iterable[Target], results: Mapping[str, Result]) -> list[Outcome]:
    """By the limits of the targets, whatever limit was known when a result was recorded."""
    outcomes = []
    for target in targets:
        figures = results.get(target.result, {}).get("figures", [])
        values = [each["value"] for each in figures if each["name"] == target.figure]
        outcomes.append(Outcome(target, target.measured(values[-1]) if values else None))
    return outcomes
