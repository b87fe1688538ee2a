"""Processes that are watched for any use of a network, in Python or below it.

Every Python process that is started with :func:`watched` tells of itself and of each address
outside of the machine that it looks up or connects to, in one file, and is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_HOOK = """
import os
import sys

_LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
_WATCHED = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
}

def _tell(line):
    descriptor = os.open(os.environ["WATCHED_NETWORK"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, (line + "\\n").encode())
    finally:
        os.close(descriptor)

def _watch(event, arguments):
    position = _WATCHED.get(event)
    if position is None:
        return
    address = arguments[position]
    host = address[0] if isinstance(address, tuple) and address else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    # Paths are unix sockets.
    if host is None or isinstance(address, str) and "/" in address:
        return
    if not str(host).startswith(_LOCAL):
        _tell(f"network {event} {address!r} by {sys.argv}")
        raise PermissionError(f"the network is watched: {event} {address!r}")

_tell(f"process {' '.join(sys.orig_argv)}")
sys.addaudithook(_watch)
"""


@dataclass
class NetworkWatch:
    """What watched processes told."""

    folder: Path

    @classmethod
    def begin(cls, folder: Path) -> NetworkWatch:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_HOOK)
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to be watched, and their children."""
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths), "WATCHED_NETWORK": str(self._told)}

    @property
    def processes(self) -> list[str]:
        """Command lines of all that were watched."""
        return self._lines("process ")

    @property
    def attempts(self) -> list[str]:
        """Every use of a network."""
        return self._lines("network ")

    @property
    def _told(self) -> Path:
        return self.folder / "told.txt"

    def _lines(self, kind: str) -> list[str]:
        lines = self._told.read_text().splitlines()
        return [line.removeprefix(kind) for line in lines if line.startswith(kind)]
