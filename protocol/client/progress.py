"""How far a hand-over is: for its caller, its deadline, and by the daemon for those who wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

import zmq

from .. import messages as m
from ..errors import DeadlineExceeded, SidecarError
from .deadline import Deadline
from .exchange import Exchanges, OpenRequest
from .session import ClientSession

OnProgress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""

_REPORT_SECONDS = 0.2  # between two reports to the daemon
_TELL_SECONDS = 0.05  # between two calls of the caller's function
_LOOK_SECONDS = 0.02  # between two questions whether to stop
_ANSWER_SECONDS = 1.0


class FillReports:
    """Tells the daemon how much of a region is filled. Never waits for it and never raises.

    At most one report is unanswered, so a daemon that hangs is told nothing more; neither is one
    that refuses, which is older than this message.
    """

    def __init__(self, exchanges: Exchanges, session: ClientSession, region: str) -> None:
        self._exchanges = exchanges
        self._session = session
        self._region = region
        self._next = time.monotonic() + _REPORT_SECONDS
        self._said = 0
        self._refused = False
        self._open = contextlib.ExitStack()
        self._unanswered: OpenRequest | None = None

    def tell(self, nbytes: int) -> None:
        """So many bytes are in the region, all together."""
        now = time.monotonic()
        if nbytes == self._said or now < self._next or self._session.lost.is_set():
            return
        if not self._take_answer():
            return
        self._said, self._next = nbytes, now + _REPORT_SECONDS
        with contextlib.suppress(SidecarError, zmq.ZMQError):
            self._unanswered = self._open.enter_context(
                self._exchanges.open(
                    self._session,
                    m.FillProgress(self._region, nbytes),
                    Deadline(_ANSWER_SECONDS),
                )
            )

    def _take_answer(self) -> bool:
        """Whether the next report may be sent."""
        if self._unanswered is None:
            return not self._refused
        with contextlib.suppress(SidecarError, zmq.ZMQError):
            if not self._unanswered.is_answered():
                return False
            self._refused = isinstance(self._unanswered.receive()[0], m.Failed)
            self._unanswered = None
            self._open.close()
            return not self._refused
        self._drop()
        return False

    def _drop(self) -> None:
        """Withdraw a report whose answer nobody will read."""
        self._unanswered = None
        self._refused = True
        with contextlib.suppress(SidecarError, zmq.ZMQError), self._open.pop_all():
            raise SidecarError("given up")

    def close(self) -> None:
        """No more reports. Before commit, as an open one may keep what the fill's stack held."""
        self._take_answer()
        if self._unanswered is not None:
            self._drop()
        self._refused = True

    def __enter__(self) -> FillReports:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Progress:
    """One hand-over's progress, whoever fills. Thread-safe.

    Bytes that come restart the deadline: what is slow is waited for, what stands still is not.
    """

    def __init__(
        self, component: m.Component, deadline: Deadline, on_progress: OnProgress | None
    ) -> None:
        self._label = component.label
        self._total = sum(tensor.nbytes for tensor in component.tensors)
        self._deadline = deadline
        self._on_progress = on_progress
        self._lock = threading.RLock()
        self._done = 0
        self._told = 0.0
        self._looked = 0.0

    def begin(self) -> None:
        """Nothing is there yet: the first fill, or one more after the last was lost."""
        self._done = 0

    def add(self, nbytes: int, reports: FillReports) -> None:
        """This process filled ``nbytes`` more, or wants to know whether to go on (0).

        Raises Cancelled, DeadlineExceeded, and what the caller's functions raise.
        """
        with self._lock:
            if nbytes:
                self._deadline.restart()
                self._done = min(self._total, self._done + nbytes)
            self._look()
            reports.tell(self._done)
            if nbytes:
                self._tell()

    def heard(self, filling: m.Filling) -> None:
        """Another process fills."""
        with self._lock:
            self._deadline.restart()
            self._done = min(self._total, filling.filled)
            self._tell()

    def finish(self) -> None:
        """The component is resident. Told only to those who were told of a beginning."""
        with self._lock:
            if 0 < self._done < self._total and self._on_progress is not None:
                self._on_progress(self._total, self._total)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if not self._deadline.remaining:
            raise DeadlineExceeded(
                f"filling {self._label}: not one byte came within {self._deadline.seconds:g} s; "
                "look whether the disk or network share that holds the file still answers"
            )
        self._deadline.next_wait(f"filling {self._label}")

    def _tell(self) -> None:
        now = time.monotonic()
        if self._on_progress is None:
            return
        if self._done == self._total or now - self._told >= _TELL_SECONDS:
            self._told = now
            self._on_progress(self._done, self._total)
