"""What the messages' fields may hold, and the base of all messages."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .. import limits

Name = Annotated[str, Meta(max_length=limits.NAME)]
Text = Annotated[str, Meta(max_length=limits.TEXT)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Bytes = Annotated[int, Meta(ge=0, le=limits.REGION)]
Device = Annotated[str, Meta(pattern=r"^(cpu|GPU-[0-9a-f-]{36})\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^(file|bytes|nonce):[0-9a-f]{64}\Z")]
Role = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]
RegionId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
LeaseId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Token = Annotated[bytes, Meta(min_length=32, max_length=32)]
RegionKind = Literal["memfd", "cuda_ipc"]
Compile = Literal["auto", "on", "off"]


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all: tagged by class name."""
