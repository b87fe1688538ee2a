"""Frames on a unix stream socket, with file descriptors riding on them.

A frame is its length (4 bytes, big endian) and that many bytes. A descriptor is sent with the
first byte of its frame; Linux never merges it with a later one, so that frames that announce a
descriptor find theirs in order of arrival.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque

from . import limits
from .errors import BadMessage, TooLarge

_LENGTH = struct.Struct("!I")
_READ_BYTES = 64 * limits.KIB
_UNCLAIMED = 8 * limits.DESCRIPTORS_PER_FRAME


class StreamClosed(ConnectionError):
    """The peer is gone."""


class FrameStream:
    """One end of a session stream or keeper channel. Owns the socket and unclaimed descriptors.

    The socket is made non-blocking; whoever drives it waits for readiness in its own way. Not
    thread-safe: one thread receives, and callers serialise their sends.
    """

    def __init__(self, sock: socket.socket, *, backlog: int = limits.STREAM_BACKLOG) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._backlog = backlog
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self._outgoing: deque[tuple[memoryview, int | None]] = deque()
        self._unsent = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether :meth:`flush` should be called when the socket becomes writable."""
        return bool(self._outgoing)

    # --- receiving

    def read_available(self) -> None:
        """Take in what the kernel has, without blocking. StreamClosed at the end."""
        try:
            data, descriptors, flags, _ = socket.recv_fds(self.sock, _READ_BYTES, _UNCLAIMED)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionError as error:
            raise StreamClosed(str(error)) from None
        self._descriptors.extend(descriptors)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > _UNCLAIMED:
            raise BadMessage(
                "file descriptors were lost: the peer sent more than its frames announce, or this "
                "process may open no more (see `ulimit -n`)"
            )
        if not data:
            raise StreamClosed("the peer closed the stream")
        self._incoming += data

    def take_preamble(self, nbytes: int) -> bytes | None:
        """The first ``nbytes`` raw bytes, or None while they have not all arrived."""
        if len(self._incoming) < nbytes:
            return None
        data = bytes(self._incoming[:nbytes])
        del self._incoming[:nbytes]
        return data

    def take_frame(self) -> bytes | None:
        """The next whole frame's payload, or None. Raises TooLarge as soon as one is announced."""
        if len(self._incoming) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._incoming)
        if length > limits.STREAM_FRAME:
            raise TooLarge(f"a frame of {length} bytes exceeds the limit of {limits.STREAM_FRAME}")
        end = _LENGTH.size + length
        if len(self._incoming) < end:
            return None
        payload = bytes(self._incoming[_LENGTH.size : end])
        del self._incoming[:end]
        return payload

    def take_descriptor(self) -> int:
        """The oldest unclaimed descriptor, now the caller's. Raises BadMessage if there is none."""
        if not self._descriptors:
            raise BadMessage("a message announces a file descriptor and none came with it")
        return self._descriptors.popleft()

    # --- sending

    def queue_raw(self, data: bytes) -> None:
        """Queue bytes that are no frame (the preamble)."""
        self._enqueue(data, None)

    def queue_frame(self, payload: bytes, descriptor: int | None = None) -> None:
        """Queue one frame. Takes over ``descriptor`` and closes it once it is sent.

        Raises :class:`StreamClosed` when the peer has not read for so long that the backlog is
        full: it is to be dropped.
        """
        self._enqueue(_LENGTH.pack(len(payload)) + payload, descriptor)

    def _enqueue(self, data: bytes, descriptor: int | None) -> None:
        if self._unsent + len(data) > self._backlog:
            if descriptor is not None:
                os.close(descriptor)
            raise StreamClosed(f"the peer left {self._unsent} bytes unread")
        self._outgoing.append((memoryview(data), descriptor))
        self._unsent += len(data)

    def flush(self) -> None:
        """Send as much as the kernel takes, without blocking."""
        while self._outgoing:
            data, descriptor = self._outgoing[0]
            try:
                if descriptor is None:
                    sent = self.sock.send(data)
                else:
                    sent = socket.send_fds(self.sock, [data], [descriptor])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise StreamClosed(str(error)) from None
            self._unsent -= sent
            if descriptor is not None:
                os.close(descriptor)
            if sent < len(data):
                self._outgoing[0] = (data[sent:], None)
            else:
                self._outgoing.popleft()

    def close(self) -> None:
        """Close the socket and every descriptor that nobody claimed or that was not yet sent."""
        self.sock.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        for _, unsent in self._outgoing:
            if unsent is not None:
                os.close(unsent)
        self._descriptors.clear()
        self._outgoing.clear()
