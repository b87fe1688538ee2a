"""The daemon's sockets spoken by hand, so that every rule can be broken."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack
from xdit_sidecar.protocol.version import PREAMBLE_BYTES, encode_preamble

SECONDS = 5.0
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def connect(path: Path) -> socket.socket:
    """A connected stream socket that never blocks for longer than a few seconds."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(SECONDS), 0))
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def read_exactly(sock: socket.socket, nbytes: int) -> bytes:
    """EOFError when the daemon hangs up first."""
    data = b""
    while len(data) < nbytes:
        more = sock.recv(nbytes - len(data))
        if not more:
            raise EOFError(f"hung up after {len(data)} of {nbytes} bytes")
        data += more
    return data


def is_cut(sock: socket.socket) -> bool:
    """Whether the daemon hangs up; what it says before is read and dropped."""
    with contextlib.suppress(ConnectionError):
        try:
            while sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except BlockingIOError:  # SO_RCVTIMEO
            return False
    return True


# --- session stream


def frame(message: object) -> bytes:
    """A message on the session stream; bytes go out as they are."""
    payload = message if isinstance(message, bytes) else msgpack.packb(message)
    return struct.pack("!I", len(payload)) + payload


def hello(**fields: object) -> dict[str, object]:
    """A valid hello."""
    return {"type": "hello", "name": "hostile", "pid": os.getpid(), **fields}


class RawSession:
    """A session opened by hand. Nothing is read after the welcome unless asked for."""

    def __init__(self, path: Path) -> None:
        self.sock = connect(path)
        try:
            self.sock.sendall(encode_preamble() + frame(hello()))
            read_exactly(self.sock, PREAMBLE_BYTES)
            (length,) = struct.unpack("!I", read_exactly(self.sock, 4))
            welcome = msgpack.unpackb(read_exactly(self.sock, length))
            if welcome["type"] != "welcome":
                raise ConnectionError(f"refused: {welcome['code']}")
        except BaseException:
            self.sock.close()
            raise
        self.token: bytes = welcome["token"]

    def drain(self) -> None:
        """Read and drop what is there, descriptors included."""
        with contextlib.suppress(OSError):
            while True:
                # Not recv_fds: Python 3.11's ignores the flags.
                data, ancillary, _, _ = self.sock.recvmsg(65536, 4096, socket.MSG_DONTWAIT)
                for *_, packed in ancillary:
                    for (descriptor,) in struct.iter_unpack("i", packed):
                        os.close(descriptor)
                if not data:
                    return

    def __enter__(self) -> RawSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drain()
        self.sock.close()


# --- ZeroMQ


def zmtp_frame(data: bytes, *, more: bool = False, announced: int | None = None) -> bytes:
    """One ZMTP 3 message frame; ``announced`` lies about its length."""
    length = len(data) if announced is None else announced
    if length < 256:
        return bytes([more, length]) + data
    return bytes([more | 2]) + struct.pack("!Q", length) + data


def zmtp_ready(identity: bytes = b"") -> bytes:
    """The READY command, with any routing id."""
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", identity)):
        body += bytes([len(name)]) + name + struct.pack("!I", len(value)) + value
    if len(body) < 256:
        return bytes([4, len(body)]) + body
    return bytes([6]) + struct.pack("!Q", len(body)) + body


@contextlib.contextmanager
def raw_zmq(path: Path, identity: bytes = b"") -> Iterator[socket.socket]:
    """A greeted ZeroMQ connection. ConnectionError or EOFError when the daemon refuses it."""
    with connect(path) as sock:
        sock.sendall(_GREETING)
        read_exactly(sock, len(_GREETING))
        sock.sendall(zmtp_ready(identity))
        read_exactly(sock, 2)  # the daemon's READY begins: we are in
        yield sock


GREETING = _GREETING
