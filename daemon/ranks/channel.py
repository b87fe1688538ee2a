"""A rank process's end of its channel to the broker: what it is told, and its first words."""

from __future__ import annotations

import contextlib
import select
import socket

from ...protocol import codec, limits
from ...protocol.frames import FrameStream, StreamClosed
from .messages import Assignment, Imported, RankWord, Refused


class RankChannel:
    """Owns the descriptor that the broker passed on."""

    def __init__(self, descriptor: int) -> None:
        self._stream = FrameStream(socket.socket(fileno=descriptor))

    def tell_imported(self) -> None:
        """Everything is imported."""
        self._tell(Imported())

    def refuse(self, error: BaseException) -> None:
        """Tell why this process ends before it has begun."""
        self._tell(Refused(f"{type(error).__name__}: {error}"[: limits.TEXT]))

    def wait_for_assignment(self) -> Assignment | None:
        """What the broker wants this process to be, or None when the broker hangs up.

        Raises BadMessage or TooLarge for anything that is no assignment.
        """
        poller = select.poll()
        poller.register(self._stream, select.POLLIN)
        while (frame := self._stream.take_frame()) is None:
            poller.poll()
            try:
                self._stream.read_available()
            except StreamClosed:
                return None
        return codec.decode(frame, Assignment, limit=limits.STREAM_FRAME)

    def close(self) -> None:
        """The broker takes it that this process is about to end."""
        self._stream.close()

    def _tell(self, word: RankWord) -> None:
        with contextlib.suppress(StreamClosed):  # then this process is about to be killed
            self._stream.queue_frame(codec.encode(word))
            self._stream.flush()
