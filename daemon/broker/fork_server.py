"""The broker's end of the process that ranks are forked from.

Most of a rank's start is imports. That process does them once, so that ranks that take the places
of others are there at once, and share the memory of what is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ...protocol import codec, limits
from ...protocol.errors import SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ..ranks.messages import Ended, Fork, Forked, Imported, NotForked, Refused, ServerWord
from .child_process import ChildProcess
from .log import log

_END_SECONDS = 2.0  # in which it ends what it forked, and then itself


class Child(Protocol):
    """Who is told what becomes of a process."""

    def forked(self, pid: int) -> None:
        """It is there."""

    def not_forked(self, reason: str) -> None:
        """There will be none."""

    def ended(self, status: int) -> None:
        """It is reaped: its exit status, negative for a signal."""


class ForkServer:
    """Started with ``arguments`` when a process is wanted, and again if it has ended since.

    If it ends, the kernel ends what it forked.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._loop = asyncio.get_running_loop()
        self._process: ChildProcess | None = None
        self._stream: FrameStream | None = None
        self._error: str | None = None  # its last words
        self._wanted: deque[Child] = deque()
        self._children: dict[int, Child] = {}

    @property
    def pid(self) -> int | None:
        """Its pid while it runs."""
        return self._process.pid if self._process is not None else None

    def fork(self, child: Child, channel: int) -> None:
        """Order a process that owns ``channel``, which is taken over; ``child`` is told.

        Raises OSError if there is no process to fork it from and none can be started.
        """
        stream = self._stream or self._start()
        stream.queue_frame(codec.encode(Fork()), channel)
        stream.flush()  # some bytes, which the socket takes while the other end imports
        self._wanted.append(child)

    def kill(self) -> None:
        """End it, and with it what it forked; who waits for a process is told."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it and what it forked now. Nobody is told."""
        if self._process is not None:
            self._hang_up()
            self._process.wait(_END_SECONDS)
            self._process.discard()
            self._process = None
        self._wanted.clear()
        self._children.clear()

    def _start(self) -> FrameStream:
        ours, theirs = socket.socketpair()
        stream = FrameStream(ours)
        try:
            with theirs:
                self._process = ChildProcess(
                    "xdit_sidecar.daemon.ranks",
                    ["--channel", str(theirs.fileno()), *self._arguments],
                    on_exit=self._exited,
                    descriptors=[theirs.fileno()],
                )
        except OSError:
            stream.close()
            raise
        self._stream, self._error = stream, None
        self._loop.add_reader(stream, self._readable)
        log("fork-server-started", pid=self.pid)
        return stream

    def _readable(self) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            stream.read_available()
            # Who hears that the last rank ended may close this.
            while self._stream is stream and (frame := stream.take_frame()) is not None:
                self._hear(codec.decode(frame, ServerWord, limit=limits.STREAM_FRAME))
        except StreamClosed:
            self._loop.remove_reader(stream)  # it is about to end
        except (SidecarError, LookupError) as error:
            self._error = f"it spoke nonsense: {error}"
            self.kill()

    def _hear(self, word: ServerWord) -> None:
        match word:
            case Imported():
                log("fork-server-ready", pid=self.pid)
            case Refused(reason):
                self._error = reason
            case Forked(pid):
                child = self._children[pid] = self._wanted.popleft()
                child.forked(pid)
            case NotForked(reason):
                self._wanted.popleft().not_forked(reason)
            case Ended(pid, status):
                self._children.pop(pid).ended(status)

    def _exited(self, status: int) -> None:
        self._readable()  # its last words may still be there
        self._hang_up()
        told = f"the process {self.pid} that ranks are forked from ended ({status})"
        error = self._error or told
        log("fork-server-lost", "error", pid=self.pid, status=status, error=error)
        self._process = None
        self._children.clear()  # they are being ended, which they are watched for
        wanted, self._wanted = self._wanted, deque()
        for child in wanted:
            child.not_forked(error)

    def _hang_up(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(ValueError):  # it was closed before
                self._loop.remove_reader(self._stream)
            self._stream.close()
            self._stream = None
