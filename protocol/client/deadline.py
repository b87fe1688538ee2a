"""How long a call may wait, and who may stop it earlier."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import Cancelled, DeadlineExceeded

ShouldCancel = Callable[[], bool]

_SLICE_SECONDS = 0.02


class Deadline:
    """``seconds`` from now; ``should_cancel`` is asked about fifty times a second while waiting.

    It may also raise: the exception passes through the waiting call (ComfyUI's interrupt check
    does that).
    """

    def __init__(self, seconds: float, should_cancel: ShouldCancel | None = None) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._should_cancel = should_cancel

    def restart(self) -> None:
        """Count from now: there was a sign of life."""
        self._end = time.monotonic() + self.seconds

    @property
    def remaining(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def next_wait(self, doing: str) -> float:
        """Seconds to wait before looking again. Raises Cancelled or DeadlineExceeded."""
        if self._should_cancel is not None and self._should_cancel():
            raise Cancelled(f"{doing}: cancelled by the caller")
        remaining = self.remaining
        if not remaining:
            raise DeadlineExceeded(
                f"{doing}: no answer from the daemon within {self.seconds:g} s; "
                "`xdit-sidecar ipc health-check` tells what hangs"
            )
        return min(_SLICE_SECONDS, remaining)
