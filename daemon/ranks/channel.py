"""A process's end of its channel to the broker, before there is a session."""

from __future__ import annotations

import contextlib
import select
import socket

import msgspec

from ...protocol import codec, limits
from ...protocol.frames import FrameStream, StreamClosed
from .messages import Assignment, Refused


class Channel:
    """Owns the descriptor that it is made of."""

    def __init__(self, descriptor: int) -> None:
        self._stream = FrameStream(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """For a poll."""
        return self._stream.fileno()

    def tell(self, word: msgspec.Struct) -> None:
        """Say something. Nothing if the broker is gone: then this process is about to be killed."""
        with contextlib.suppress(StreamClosed):
            self._stream.queue_frame(codec.encode(word))
            self._stream.flush()

    def refuse(self, error: BaseException) -> None:
        """Tell why this process ends before it has begun."""
        self.tell(Refused(f"{type(error).__name__}: {error}"[: limits.TEXT]))

    def read(self) -> list[bytes]:
        """The frames that have arrived, without waiting. Raises StreamClosed at the end."""
        self._stream.read_available()
        return list(iter(self._stream.take_frame, None))

    def receive_assignment(self) -> Assignment | None:
        """Wait for what the broker wants this process to be; None when it hangs up.

        Raises BadMessage or TooLarge for anything that is no assignment.
        """
        poller = select.poll()
        poller.register(self._stream, select.POLLIN)
        while True:
            poller.poll()
            try:
                for frame in self.read():
                    return codec.decode(frame, Assignment, limit=limits.STREAM_FRAME)
            except StreamClosed:
                return None

    def take_descriptor(self) -> int:
        """The descriptor that came with a frame. Raises BadMessage if there is none."""
        return self._stream.take_descriptor()

    def close(self) -> None:
        """The broker takes it that this process is about to end."""
        self._stream.close()
