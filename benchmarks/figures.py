"""A measured figure and the threshold that it must meet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; at most ``threshold``, or only reported when that is None."""

    name: str
    value: float
    unit: str
    threshold: float | None = None

    @property
    def met(self) -> bool:
        return self.threshold is None or self.value <= self.threshold

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "threshold": self.threshold,
            "met": self.met,
        }

    def __str__(self) -> str:
        bound = "" if self.threshold is None else f" (at most {self.threshold:g})"
        return f"{self.name}: {self.value:.3f} {self.unit}{bound}"


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]
