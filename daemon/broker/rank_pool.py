"""Processes for ranks: *spares* that have imported everything already, or else fresh ones.

Most of a rank's start is imports, so that a group whose ranks were killed is back much sooner with
spares. What becomes of a spare is no failure of the ranks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ...protocol.frames import StreamClosed
from ..ranks.messages import Assignment
from .child_process import RestartPolicy
from .log import log
from .rank_process import RankProcess


class RankPool:
    """Starts processes with ``arguments`` and keeps up to ``spares`` of them waiting."""

    def __init__(self, arguments: Sequence[str], spares: int) -> None:
        self._arguments = list(arguments)
        self._spares = spares
        self._waiting: list[RankProcess] = []
        self._filling = False
        self._policy = RestartPolicy()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None  # until the next spare is started

    @property
    def ready(self) -> int:
        """How many spares have imported everything."""
        return sum(process.imported for process in self._waiting)

    def take(self, assignment: Assignment, on_exit: Callable[[int], None]) -> RankProcess:
        """A process that becomes this rank. No spare is started until :meth:`fill`.

        Raises OSError if none can be started.
        """
        self._stop_filling()
        while self._waiting:
            spare = self._waiting.pop(0)  # the oldest is furthest
            spare.on_imported, spare.on_exit = _ignore, on_exit
            try:
                spare.assign(assignment)
            except StreamClosed:  # it died just now
                spare.discard()
            else:
                return spare
        fresh = RankProcess(self._arguments, on_imported=_ignore, on_exit=on_exit)
        try:
            fresh.assign(assignment)
        except StreamClosed:
            fresh.discard()
            raise
        return fresh

    def fill(self) -> None:
        """Start spares, one after another, because their imports take the cores of the ranks."""
        self._filling, self._policy = True, RestartPolicy()
        self._start_next()

    def close(self) -> None:
        """End all spares and start no more."""
        self._stop_filling()
        while self._waiting:
            self._waiting.pop().discard()

    def _stop_filling(self) -> None:
        self._filling = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_next(self) -> None:
        self._timer = None
        if len(self._waiting) >= self._spares or len(self._waiting) > self.ready:
            return
        try:
            spare = RankProcess(
                self._arguments,
                on_imported=self._imported,
                on_exit=lambda status: self._lost(spare, status),
            )
        except OSError as error:  # no descriptors, processes or memory left
            self._start_again(f"could not be started: {error}")
        else:
            self._waiting.append(spare)
            log("spare-started", "debug", pid=spare.pid)

    def _imported(self) -> None:
        log("spare-ready", "debug", ready=self.ready, of=self._spares)
        self._policy.started()
        if self._filling and self._timer is None:
            self._start_next()

    def _lost(self, spare: RankProcess, status: int) -> None:
        self._waiting.remove(spare)
        self._start_again(spare.error or f"the process {spare.pid} ended ({status})")

    def _start_again(self, error: str) -> None:
        if not self._filling:
            return
        delay = self._policy.failed()
        if delay is None:
            self._stop_filling()
            log("spares-given-up", "warning", error=error)
            return
        log("spare-lost", "warning", error=error)
        if self._timer is None:
            self._timer = self._loop.call_later(delay, self._start_next)


def _ignore() -> None:
    """A process that was taken is ready when it asks for a task."""
