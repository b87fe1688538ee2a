"""The runtime directory and the sockets in it.

One private directory holds everything through which a daemon can be reached; nothing listens on a
network.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import NamedTuple

from .errors import SidecarError

RUNTIME_DIR_VARIABLE = "XDIT_SIDECAR_RUNTIME_DIR"
SYSTEM_DIRECTORY = "/run/xdit-sidecar"  # only root can make it: of the host's daemon

# sizeof(sockaddr_un.sun_path) less the closing zero.
LONGEST_SOCKET_PATH = 107


class RuntimeDirError(SidecarError):
    """The runtime directory cannot be used as it is."""

    code = "runtime-dir"


class Endpoints(NamedTuple):
    """Where the parts of a runtime directory lie."""

    directory: Path

    @property
    def session(self) -> Path:
        return self.directory / "session.sock"

    @property
    def control(self) -> Path:
        return self.directory / "control.sock"

    @property
    def bulk(self) -> Path:
        return self.directory / "bulk.sock"

    @property
    def lock(self) -> Path:
        return self.directory / "daemon.lock"

    @property
    def sockets(self) -> tuple[Path, Path, Path]:
        return self.session, self.control, self.bulk


def zmq_address(path: Path) -> str:
    """The ZeroMQ endpoint of a socket file."""
    return f"ipc://{path}"


def resolve_runtime_dir(given: str | os.PathLike[str] | None = None) -> Endpoints:
    """The directory that a daemon serves, whether or not it exists.

    In this order: ``given``, ``$XDIT_SIDECAR_RUNTIME_DIR``, ``$XDG_RUNTIME_DIR/xdit-sidecar``, and
    ``/run/xdit-sidecar`` for root. Raises :class:`RuntimeDirError` when none applies or the path
    is too long for a unix socket.
    """
    if given is None:
        given = os.environ.get(RUNTIME_DIR_VARIABLE) or None
    if given is not None and not os.fspath(given):
        raise RuntimeDirError("the runtime directory is empty: name one with --runtime-dir")
    if given is None:
        if base := os.environ.get("XDG_RUNTIME_DIR"):
            given = Path(base) / "xdit-sidecar"
        elif os.geteuid() == 0:
            given = SYSTEM_DIRECTORY
        else:
            raise RuntimeDirError(
                "no runtime directory: XDG_RUNTIME_DIR is not set (a login session sets it); "
                f"give --runtime-dir or set {RUNTIME_DIR_VARIABLE}"
            )
    endpoints = Endpoints(Path(os.path.abspath(given)))
    longest = max(len(os.fsencode(path)) for path in endpoints.sockets)
    if longest > LONGEST_SOCKET_PATH:
        raise RuntimeDirError(
            f"the runtime directory {endpoints.directory} is too long for a unix socket by "
            f"{longest - LONGEST_SOCKET_PATH} bytes: choose a shorter one with --runtime-dir"
        )
    return endpoints


def client_places(given: str | os.PathLike[str] | None = None) -> tuple[Endpoints, ...]:
    """Where a client looks for a daemon, the strongest first.

    ``given`` or ``$XDIT_SIDECAR_RUNTIME_DIR`` alone where there is one; else that of the account's
    own daemon (``$XDG_RUNTIME_DIR``, or ``/run/user/UID`` for services, which have no such
    variable), then the host's. Raises :class:`RuntimeDirError`.
    """
    if given is not None or os.environ.get(RUNTIME_DIR_VARIABLE):
        return (resolve_runtime_dir(given),)
    host = resolve_runtime_dir(SYSTEM_DIRECTORY)
    if os.environ.get("XDG_RUNTIME_DIR"):
        return resolve_runtime_dir(), host
    return resolve_runtime_dir(f"/run/user/{os.geteuid()}/xdit-sidecar"), host


def find_daemon(places: tuple[Endpoints, ...]) -> Endpoints:
    """The first place where something listens; else where we may not knock; else the first."""
    if len(places) == 1:
        return places[0]
    closed = []
    for place in places:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.setblocking(False)
            try:
                knock.connect(str(place.session))
            except PermissionError:
                closed.append(place)
                continue
            except BlockingIOError:  # many wait there already
                pass
            except OSError:  # nothing there, or left behind by a daemon that is gone
                continue
            return place
    return (closed or places)[0]


def why_not_private(path: Path, *, owner: int, loosest: int) -> str | None:
    """What is wrong with owner or mode of a file or directory, or None.

    ``loosest`` is the mode that it may have at most (0o700 for a private directory).
    """
    found = path.stat()
    if found.st_uid != owner:
        return f"{path} belongs to uid {found.st_uid}, not to uid {owner}"
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~loosest:
        return f"{path} has mode {mode:04o}, wider than {loosest:04o}"
    return None
