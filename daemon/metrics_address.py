"""Where metrics may be served: a unix socket or a loopback port, never a network."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import NamedTuple

from ..protocol.endpoints import LONGEST_SOCKET_PATH


class MetricsAddress(NamedTuple):
    """Either a socket file, or a loopback address and port."""

    path: Path | None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path is not None else f"{host}:{self.port}"


def parse_metrics_address(text: str) -> MetricsAddress:
    """Read ``unix:/path``, ``127.0.0.1:PORT`` or ``[::1]:PORT``. Raises ValueError."""
    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:"))
        if not path.is_absolute() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise ValueError("the socket's path must be absolute and at most 107 bytes long")
        return MetricsAddress(path)
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        raise ValueError("write unix:/path, 127.0.0.1:PORT or [::1]:PORT") from None
    if not address.is_loopback:
        raise ValueError(f"{host} is not a loopback address: metrics are for this host only")
    if not 0 < number < 1 << 16:
        raise ValueError(f"{port!r} is no port")
    return MetricsAddress(None, str(address), number)
