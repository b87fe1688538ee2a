"""Keeps what peers make the broker hold within bounds.

libzmq counts complete messages against its high-water marks; the parts of a message that never
ends are held without bound. The guard watches the process's own memory and cuts connections when
it has grown by more than the limit, strangers first.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable, Sequence

from ...protocol import limits
from ...protocol.peers import Peer
from .router import Router

_PERIOD_SECONDS = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident set size of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


class MemoryGuard:
    """Runs on the event loop from creation to :meth:`close`."""

    def __init__(self, routers: Sequence[Router], known: Callable[[Peer], bool]) -> None:
        self._routers = routers
        self._known = known
        self._limit = resident_bytes() + limits.UNREAD_MEMORY
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._look)

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._look)
        if resident_bytes() > self._limit:
            for router in self._routers:
                router.shed(self._known)
            # Freed memory counts as resident until the allocator gives it back to the system.
            self._loop.call_later(_PERIOD_SECONDS / 2, _trim)


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)
