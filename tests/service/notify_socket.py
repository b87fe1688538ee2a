"""A service manager's end of the notify protocol, for a real daemon to talk to."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path


class NotifySocket:
    """Receives datagrams; the kernel says who sent each."""

    def __init__(self, path: Path | str) -> None:
        self.address = f"@{path}" if isinstance(path, str) else str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + self.address[1:] if isinstance(path, str) else self.address)
        self.senders: set[int] = set()

    def next(self, seconds: float) -> dict[str, str] | None:
        """The fields of the next message, None if there is none in time."""
        self._socket.settimeout(seconds)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError:
            return None
        self.senders.add(int.from_bytes(ancillary[0][2][:4], "little"))
        return dict(line.split("=", 1) for line in data.decode().split("\n"))

    def wait_for(self, key: str, value: str = "", seconds: float = 15.0) -> dict[str, str]:
        """The next message with this key, whose value begins so; others are passed over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            message = self.next(left)
            if message is not None and message.get(key, "\0").startswith(value):
                return message
        raise AssertionError(f"no {key}={value}… within {seconds:.0f} s")

    def drain(self) -> list[dict[str, str]]:
        """What has arrived so far."""
        found = []
        while (message := self.next(0.001)) is not None:
            found.append(message)
        return found

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def notify_socket(path: Path | str) -> Iterator[NotifySocket]:
    listening = NotifySocket(path)
    try:
        yield listening
    finally:
        listening.close()
        if isinstance(path, Path):
            os.unlink(path)
