"""One line per event, as journald and grep like it: ``event key=value …``.

Values come from peers in part (labels, names), so that control characters are escaped. Warnings are
mostly caused by peers, too: one that misbehaves in a loop gets a bounded number of lines.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Literal

Fact = str | int | float | None

logger = logging.getLogger("xdit_sidecar")

_WINDOW_SECONDS = 10.0
_LINES_PER_PEER = 50  # of one event and process, in a window
_LINES = 1000  # of all events together


class Limiter:
    """How many lines of each kind may be written in the current window. Pure."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seen: Counter[tuple[str, object]] = Counter()
        self._total = 0
        self._left_out = 0

    def admit(self, now: float, event: str, who: object) -> tuple[bool, int]:
        """Whether to write it, and how many lines the last window left out if it ended now."""
        left_out = 0
        if now - self._began > _WINDOW_SECONDS:
            left_out = self._left_out
            self._began, self._total, self._left_out = now, 0, 0
            self._seen.clear()
        if self._total >= _LINES or self._seen[event, who] >= _LINES_PER_PEER:
            self._left_out += 1
            return False, left_out
        self._total += 1
        self._seen[event, who] += 1
        return True, left_out


_limiter = Limiter()


def log(
    event: str,
    level: Literal["debug", "info", "warning", "error"] = "info",
    facts: Mapping[str, Fact] | None = None,
    **more: Fact,
) -> None:
    """Write one event. Never give it a handle or a token."""
    given = {**(facts or {}), **more}
    if level == "warning" and "pid" in given:
        admitted, left_out = _limiter.admit(time.monotonic(), event, given["pid"])
        if left_out:
            logger.warning("lines-left-out count=%d", left_out)
        if not admitted:
            return
    words = [event, *(f"{key}={_render(value)}" for key, value in given.items())]
    getattr(logger, level)(" ".join(words))


def _render(value: Fact) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, str):
        return str(value)
    return value if value.isidentifier() or value.isalnum() else json.dumps(value)
