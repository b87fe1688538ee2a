"""Components, and what a lease holder needs to open one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..manifest import Manifest
from .fields import Bytes, Count, Device, Fingerprint, Name, RegionId, RegionKind, Role


class RegionGrant(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a lease holder needs to open a region."""

    region: RegionId
    kind: RegionKind
    device: Device
    nbytes: Bytes
    handle: Annotated[bytes, Meta(min_length=64, max_length=64)] | None = None
    descriptor: Count | None = None  # number of the Descriptor on the session stream

    def __repr__(self) -> str:
        return (
            f"RegionGrant(kind={self.kind!r}, device={self.device!r}, nbytes={self.nbytes}, "
            "region=<hidden>, handle=<hidden>)"
        )


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """A named set of tensors and where they lie in its region."""

    fingerprint: Fingerprint
    role: Role
    label: Name  # for people: the file's name
    tensors: Manifest
