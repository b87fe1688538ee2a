"""Messages that have been received and not yet worked on, one queue per process.

Processes are served in turn, so that one that floods the daemon waits for itself only. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from ...protocol.peers import Peer


class Sized(Protocol):
    """What waits: it knows its bytes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Inbox(Generic[T]):
    """At most ``limit`` messages of one process wait; :attr:`nbytes` is what all of them hold."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[Peer, deque[T]] = {}  # in the order in which they are served
        self.nbytes = 0

    def put(self, peer: Peer, message: T) -> bool:
        """Queue a message; False, and it is not queued, if this process has too many waiting."""
        queue = self._queues.setdefault(peer, deque())
        if len(queue) >= self._limit:
            return False
        queue.append(message)
        self.nbytes += message.nbytes
        return True

    def take(self) -> tuple[Peer, T] | None:
        """The oldest message of the process whose turn it is."""
        for peer in self._queues:
            queue = self._queues.pop(peer)
            message = queue.popleft()
            if queue:
                self._queues[peer] = queue
            self.nbytes -= message.nbytes
            return peer, message
        return None
