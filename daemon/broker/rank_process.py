"""The broker's end of a rank's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable

from ...protocol import codec, limits
from ...protocol.errors import SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ..ranks.messages import Assignment, Refused
from .fork_server import ForkServer

_STATUS_SECONDS = 0.5  # after an end, in which the fork server tells the exit status


class RankProcess:
    """Forked when the fork server comes to it, then told which rank it is.

    ``on_exit(status)`` is called once, after it has ended; None: nobody can tell how.
    """

    def __init__(
        self, server: ForkServer, assignment: Assignment, on_exit: Callable[[int | None], None]
    ) -> None:
        """Raises OSError if the process cannot be started."""
        self.pid: int | None = None  # until it is forked
        self.error: str | None = None  # its last words
        self._server = server
        self._assignment = assignment
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._status: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        ours, theirs = socket.socketpair()
        self._stream: FrameStream | None = FrameStream(ours)
        try:
            server.fork(self, theirs.detach())
        except OSError:
            self._stream.close()
            raise
        self._loop.add_reader(self._stream, self._readable)

    # --- what the fork server tells

    def forked(self, pid: int) -> None:
        """It is there."""
        self.pid = pid
        if self._stream is None:
            return  # discarded meanwhile: it ends when it sees that
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:  # ended and reaped, or no descriptor is left to watch it with
            self.not_forked(f"the process {pid} cannot be watched: {error}")
            return
        self._loop.add_reader(self._pidfd, self._vanished)
        self._stream.queue_frame(codec.encode(self._assignment))
        with contextlib.suppress(StreamClosed):  # it has ended, which is noticed
            self._stream.flush()  # some hundred bytes, which an empty socket always takes

    def not_forked(self, reason: str) -> None:
        """There will be none."""
        self.error = reason
        self._finish()

    def ended(self, status: int) -> None:
        """It is reaped."""
        self._status = status
        if self._timer is not None:
            self._finish()

    # --- what the broker wants

    def kill(self) -> None:
        """End the process; ``on_exit`` follows."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        elif self.pid is None:
            self._server.kill()  # it has not come to it, and may never

    def discard(self) -> None:
        """End the process; ``on_exit`` is not called."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._forget()

    def _readable(self) -> None:
        if self._stream is None:
            return
        try:
            self._stream.read_available()
            while (frame := self._stream.take_frame()) is not None:
                self.error = codec.decode(frame, Refused, limit=limits.STREAM_FRAME).reason
        except StreamClosed:
            self._loop.remove_reader(self._stream)  # it is about to end
        except SidecarError as error:
            self.error = f"it spoke nonsense: {error}"
            self.kill()

    def _vanished(self) -> None:
        self._unwatch()
        self._timer = self._loop.call_later(_STATUS_SECONDS, self._finish)
        if self._status is not None:
            self._finish()

    def _finish(self) -> None:
        self._readable()  # its last words may still be there
        if self._stream is not None:
            self._forget()
            self._on_exit(self._status)

    def _forget(self) -> None:
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._loop.remove_reader(self._stream)
            self._stream.close()
            self._stream = None

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
