"""What broker and keeper say to each other. Internal: both always come from the same release."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ...protocol import limits

BACKLOG = 16 * limits.MIB  # of either end of the channel: what every session may ask at once


class KeeperMessage(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all: tagged by class name."""


class DescribeDevice(KeeperMessage, frozen=True, tag="describe"):
    """Answered by :class:`DeviceReport`."""


class AllocateRegion(KeeperMessage, frozen=True, tag="allocate"):
    """Make a region if ``reserve`` bytes stay free. Answered by DeviceReport."""

    region: str
    nbytes: int
    reserve: int


class ExportRegion(KeeperMessage, frozen=True, tag="export"):
    """Answered by :class:`Exported`, with a descriptor or a handle."""

    region: str


class SealRegion(KeeperMessage, frozen=True, tag="seal"):
    """Answered by :class:`KeeperDone`."""

    region: str


class FreeRegion(KeeperMessage, frozen=True, tag="free"):
    """Answered by DeviceReport."""

    region: str


class ReadRegion(KeeperMessage, frozen=True, tag="read"):
    """Answered by :class:`RegionBytes`."""

    region: str
    offset: int
    length: int


class WriteRegion(KeeperMessage, frozen=True, tag="write"):
    """Answered by KeeperDone."""

    region: str
    offset: int
    data: Annotated[bytes, Meta(max_length=limits.PROBE)]


KeeperRequestBody = (
    DescribeDevice
    | AllocateRegion
    | ExportRegion
    | SealRegion
    | FreeRegion
    | ReadRegion
    | WriteRegion
)


class KeeperRequest(msgspec.Struct, frozen=True):
    """The envelope to the keeper; it answers in order."""

    id: int
    body: KeeperRequestBody


class DeviceReport(KeeperMessage, frozen=True, tag="report"):
    """The device's memory after the request. Sizes in bytes."""

    name: str
    total: int
    free: int
    context: int


class Exported(KeeperMessage, frozen=True, tag="exported"):
    """``has_descriptor``: a file descriptor rides on this frame."""

    handle: bytes | None
    has_descriptor: bool

    def __repr__(self) -> str:
        return "Exported(<hidden>)"


class KeeperDone(KeeperMessage, frozen=True, tag="done"):
    """It is so."""


class RegionBytes(KeeperMessage, frozen=True, tag="bytes"):
    """What was read."""

    data: bytes


class OutOfDeviceMemory(KeeperMessage, frozen=True, tag="out-of-memory"):
    """The allocation was refused; so much is free. Sizes in bytes."""

    needed: int
    free: int
    total: int


class KeeperFailed(KeeperMessage, frozen=True, tag="failed"):
    """The request was refused, with a code of :mod:`...protocol.errors`."""

    code: str
    message: str


KeeperAnswerBody = (
    DeviceReport | Exported | KeeperDone | RegionBytes | OutOfDeviceMemory | KeeperFailed
)


class KeeperAnswer(msgspec.Struct, frozen=True):
    """The envelope from the keeper."""

    id: int
    body: KeeperAnswerBody
