"""What a training says while it goes on."""

from __future__ import annotations

import time
from types import TracebackType

_SECONDS = 10.0


class Progress:
    """A line every ten seconds, and one at the end."""

    def __init__(self, what: str, steps: int) -> None:
        self._what, self._steps = what, steps
        self._start = self._told = time.monotonic()
        self._sums: dict[str, float] = {}
        self._count = 0

    def __enter__(self) -> Progress:
        return self

    def tell(self, step: int, **numbers: float) -> None:
        """After each step; numbers are averaged between two lines."""
        for name, number in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + number
        self._count += 1
        now = time.monotonic()
        if now - self._told >= _SECONDS or step + 1 == self._steps:
            shown = ", ".join(f"{k} {v / self._count:.4f}" for k, v in self._sums.items())
            print(f"{self._what} {step + 1}/{self._steps}: {shown}, {now - self._start:.0f} s")
            self._told, self._sums, self._count = now, {}, 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        print(f"{self._what}: {time.monotonic() - self._start:.0f} s in all")
