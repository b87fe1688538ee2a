"""The protocol version and the handshake rule.

The same major version works across minors: a minor may only add optional fields and new message
types. Another major is refused before a single message is decoded, by the preamble that both sides
send first on the session stream. The preamble and :class:`~.messages.Refused` never change.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_PREAMBLE = struct.Struct("!4sHH")
_MAGIC = b"XDIT"

PREAMBLE_BYTES = _PREAMBLE.size


class ProtocolVersion(NamedTuple):
    """``major.minor``, ordered."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


PROTOCOL_VERSION = ProtocolVersion(1, 2)


class NotOurProtocol(ValueError):
    """The first bytes on a session stream are not a preamble of this protocol."""


def encode_preamble(version: ProtocolVersion = PROTOCOL_VERSION) -> bytes:
    """The 8 bytes that each side sends first: magic, major, minor (big endian)."""
    return _PREAMBLE.pack(_MAGIC, version.major, version.minor)


def decode_preamble(data: bytes) -> ProtocolVersion:
    """The peer's version. Raises :class:`NotOurProtocol` for anything else."""
    if len(data) != PREAMBLE_BYTES:
        raise NotOurProtocol(f"a preamble has {PREAMBLE_BYTES} bytes, got {len(data)}")
    magic, major, minor = _PREAMBLE.unpack(data)
    if magic != _MAGIC:
        raise NotOurProtocol("the peer does not speak the xdit-sidecar protocol")
    return ProtocolVersion(major, minor)


def explain_mismatch(daemon: ProtocolVersion, client: ProtocolVersion) -> str | None:
    """Why these two cannot work together and what to do, or None when they can."""
    if daemon.major == client.major:
        return None
    older = "client" if client < daemon else "daemon"
    advice = (
        "update the node pack (or the package xdit-sidecar) in ComfyUI's environment"
        if older == "client"
        else "update the daemon's environment and restart it"
    )
    return (
        f"the daemon speaks protocol {daemon}, this client {client}: "
        f"the {older} is too old; {advice}"
    )
