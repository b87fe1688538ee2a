"""What a client asks over the control socket, and what it is answered."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .. import limits
from ..errors import SidecarError
from .components import Component, RegionGrant
from .fields import Bytes, Count, Device, Fingerprint, LeaseId, Message, Name, RegionId, Text


class Ping(Message, frozen=True, tag="ping"):
    """Answered by :class:`Pong`."""


class HandOver(Message, frozen=True, tag="hand-over", kw_only=True):
    """I have this component. Answered by :class:`Fill` or, as soon as it is there, Attached."""

    device: Device
    component: Component
    progress: bool = False  # send Filling, any number of times before the answer, while we wait


class Attach(Message, frozen=True, tag="attach", kw_only=True):
    """Answered by :class:`Attached`, or Failed(unknown-component) when it is not resident."""

    device: Device
    fingerprint: Fingerprint


class FillProgress(Message, frozen=True, tag="fill-progress"):
    """The filler has written so many bytes of the region by now. Answered by :class:`Done`."""

    region: RegionId
    nbytes: Bytes


class Commit(Message, frozen=True, tag="commit"):
    """The filler is done and has synchronised its device. Answered by :class:`Attached`."""

    region: RegionId


class Abandon(Message, frozen=True, tag="abandon"):
    """The filler gives up; a waiter takes over. Answered by :class:`Done`."""

    region: RegionId


class Release(Message, frozen=True, tag="release"):
    """The session no longer maps what this lease granted. Answered by :class:`Done`."""

    lease: LeaseId


class Evict(Message, frozen=True, tag="evict", kw_only=True):
    """Free an unleased component now. Answered by :class:`Done`."""

    device: Device
    fingerprint: Fingerprint


class Probe(Message, frozen=True, tag="probe", kw_only=True):
    """Let ``reader`` ("keeper", "rank0"…) read, or write, bytes of a region that we are filling.

    Only the health-check needs it. Answered by :class:`Probed`.
    """

    region: RegionId
    reader: Annotated[str, Meta(pattern=r"^(keeper|rank[0-9]{1,3})\Z")] = "keeper"
    offset: Bytes = 0
    length: Annotated[int, Meta(ge=1, le=limits.PROBE)] = 32
    write: Annotated[bytes, Meta(min_length=1, max_length=limits.PROBE)] | None = None


class OpenScratch(Message, frozen=True, tag="open-scratch", kw_only=True):
    """Host memory that this session shares with the ranks, for tensors of one job at a time.

    Answered by :class:`ScratchOpened`. ``number`` is the client's own name for it. Each lasts until
    the session ends or another is opened ``instead_of`` it, which need not exist. Whoever gave up
    a job that used one opens another: the ranks may still be writing to it.
    """

    number: Count
    nbytes: Annotated[int, Meta(ge=limits.SCRATCH_ALIGNMENT, le=limits.SCRATCH)]
    instead_of: Count | None = None


class GetStatus(Message, frozen=True, tag="status"):
    """Answered by :class:`Status`."""


class CancelRequest(Message, frozen=True, tag="cancel"):
    """Withdraw one of our unanswered requests, by its id. Answered by :class:`Done`."""

    request: Count


# --- answers --------------------------------------------------------------------------------------


class Pong(Message, frozen=True, tag="pong"):
    """The daemon's loop is alive."""

    boot_id: Name


class Fill(Message, frozen=True, tag="fill", kw_only=True):
    """Nobody has it: map the region, copy the tensors in, synchronise, commit."""

    grant: RegionGrant


class Filling(Message, frozen=True, tag="filling", kw_only=True):
    """Not yet an answer: somebody else fills the component and is so far.

    Sent when the whole percent changes, at most a hundred times a fill.
    """

    filled: Bytes
    nbytes: Bytes


class Attached(Message, frozen=True, tag="attached", kw_only=True):
    """The component is resident; the lease keeps it so."""

    lease: LeaseId
    grant: RegionGrant
    component: Component


class ScratchOpened(Message, frozen=True, tag="scratch-opened"):
    """The scratch region is there, writable; its size never changes."""

    descriptor: Count  # number of the Descriptor on the session stream


class Done(Message, frozen=True, tag="done"):
    """It is so."""


class Probed(Message, frozen=True, tag="probed"):
    """What the reader read (empty after a write)."""

    data: Annotated[bytes, Meta(max_length=limits.PROBE)]


class Failed(Message, frozen=True, tag="failed"):
    """The request was refused; see :mod:`.errors` for the codes."""

    code: Name
    message: Text


def failed_answer(error: SidecarError) -> Failed:
    """An error as an answer, no longer than a receiver accepts."""
    return Failed(error.code, str(error)[: limits.TEXT])
