"""Telling systemd how it goes: the sd_notify protocol, and the watchdog.

Datagrams to ``$NOTIFY_SOCKET``; where that is not set, everything here does nothing. A message that
cannot be delivered is dropped: the daemon works without its service manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

_LONGEST_STATUS = 512


class Notifier:
    """The service manager's end. Does nothing with ``address`` None.

    ``watchdog`` is the time in seconds without a ping after which it ends this process; None
    without one.
    """

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        self._watchdog = watchdog
        self._socket: socket.socket | None = None
        self._status = ""
        self._timer: asyncio.TimerHandle | None = None
        if not address or address[0] not in "/@":
            return
        # "@name" is an abstract socket, whose name begins with a zero byte.
        self._address = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Notifier:
        """Take what systemd set for this process out of ``environ``: children are not meant."""
        address = environ.pop("NOTIFY_SOCKET", None)
        period, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = pid in ("", str(os.getpid()))
        watchdog = int(period) / 1e6 if ours and period.isdecimal() and int(period) else None
        return cls(address, watchdog)

    def ready(self) -> None:
        """The broker answers, or answers again after a reload."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it is a new one."""
        line = " ".join(text.split())[:_LONGEST_STATUS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def reloading(self) -> None:
        """The configuration is read again; :meth:`ready` follows."""
        self._send(
            f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self) -> None:
        """The daemon ends."""
        self._send("STOPPING=1")

    def start_watchdog(self) -> None:
        """Ping at half the watchdog's time, from the running event loop: a blocked one does not."""
        if self._socket is not None and self._watchdog is not None:
            self._ping(asyncio.get_running_loop(), self._watchdog / 2)

    def close(self) -> None:
        """Send nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ping(self, loop: asyncio.AbstractEventLoop, period: float) -> None:
        self._timer = loop.call_later(period, self._ping, loop, period)
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        # Full, or gone with the service manager: there is nobody to tell.
        with contextlib.suppress(OSError):
            self._socket.sendto(message.encode(), self._address)
