"""Keeps what peers make the broker hold within bounds.

libzmq counts complete messages against its high-water marks; the parts of a message that never
ends are held without bound. The guard watches the process's own memory and cuts connections when
it has grown by more than the limit: those of processes without a session first, then those of
processes that were sending while it grew, and all of them if that did not help.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Callable, Sequence

from ...protocol import limits
from ...protocol.peers import Peer
from .router import Router

_PERIOD_SECONDS = 0.05
_TRIES = 3
_MUCH = 16 * limits.KIB
_TRIM_EVERY = 20  # looks
_SLACK = 64 * limits.MIB
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Resident set size of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


class MemoryGuard:
    """Runs on the event loop from creation to :meth:`close`."""

    def __init__(
        self,
        routers: Sequence[Router],
        known: Callable[[Peer], bool],
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        """``held``: bytes that are held on purpose, bounded elsewhere."""
        self._routers = routers
        self._known = known
        self._held = held
        self._usual = resident_bytes() + _SLACK
        self._limit = resident_bytes() + limits.UNREAD_MEMORY
        self._looks = 0
        self._loop = asyncio.get_running_loop()
        self._trim = ctypes.CDLL(None).malloc_trim
        self._tries = 0
        self._before = 0  # bytes at the look before
        self._suspects: set[Peer] = set()  # who was sending while memory grew
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._look)

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._look)
        self._looks += 1
        resident = resident_bytes() - self._held()
        if resident > self._limit or (resident > self._usual and not self._looks % _TRIM_EVERY):
            # Freed memory counts as resident until the allocator gives it back to the system.
            self._trim(0)
            resident = resident_bytes() - self._held()
        grows, falls = resident > self._before, resident < self._before
        self._before = resident
        if resident <= self._usual:
            self._suspects.clear()
        elif grows:
            for router in self._routers:
                self._suspects |= router.processes(_is_sending)
        if resident <= self._limit:
            self._tries = 0
            return
        if falls:
            return  # what was cut is being freed
        self._tries += 1
        if self._tries <= _TRIES and self._shed(self._is_stranger):
            return
        # An honest client's request is lost with its connection: suspects are the likelier ones,
        # also if they pause just now.
        self._shed(self._is_suspect if self._tries <= 2 * _TRIES else lambda *_: True)

    def _shed(self, which: Callable[[socket.socket, Peer], bool]) -> int:
        return sum(router.shed(which) for router in self._routers)

    def _is_stranger(self, _: socket.socket, peer: Peer) -> bool:
        return not self._known(peer)

    def _is_suspect(self, _: socket.socket, peer: Peer) -> bool:
        return peer in self._suspects


def _is_sending(connection: socket.socket) -> bool:
    unread = fcntl.ioctl(connection, termios.FIONREAD, bytes(4))
    return int.from_bytes(unread, sys.byteorder) >= _MUCH
