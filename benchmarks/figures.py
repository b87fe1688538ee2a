"""A measured figure and the limit that it must keep to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; at most ``limit``, or ``at_least``; only reported where it is None."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "limit": self.limit,
            **({"at_least": True} if self.at_least else {}),
            "met": self.met,
        }

    def __str__(self) -> str:
        words = "at least" if self.at_least else "at most"
        bound = "" if self.limit is None else f" ({words} {self.limit:g})"
        return f"{self.name}: {self.value:.3f} {self.unit}{bound}"


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]
