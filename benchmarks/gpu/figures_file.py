"""A result: facts of the run and its figures, written again with each figure."""

from __future__ import annotations

import json
from pathlib import Path

from figures import Figure
from machine import describe_run
from targets import Target


class FiguresFile:
    """``path`` as it grows. ``facts`` is what stands beside the figures."""

    def __init__(self, path: Path) -> None:
        self.figures: list[Figure] = []
        self.facts = describe_run()
        self._path = path

    def add(self, name: str, value: float, unit: str, limit: float | None = None) -> None:
        """Print a figure and write all of them."""
        self.keep(Figure(name, value, unit, limit))

    def meet(self, target: Target, value: float) -> None:
        """As `add`, for one of the project's targets."""
        self.keep(target.measured(value))

    def keep(self, figure: Figure) -> None:
        """As `add`."""
        self.figures.append(figure)
        print(figure, flush=True)
        result = {**self.facts, "figures": [each.as_dict() for each in self.figures]}
        self._path.write_text(json.dumps(result, indent=2) + "\n")

    @property
    def status(self) -> int:
        """0 when every limit was kept."""
        return 0 if all(figure.met for figure in self.figures) else 1
