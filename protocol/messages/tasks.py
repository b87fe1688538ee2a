"""What the broker gives the ranks to do, over the bulk socket. Only ranks that it started get any.

A rank asks for its next task with the outcome of the last one. Tasks that every rank of the group
gets are given in the same order to all, so that they meet in the same collectives.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from .. import limits
from .components import Component, RegionGrant
from .control import Done, Failed, Probed
from .fields import Bytes, Count, Fingerprint, Message, Name, RegionId
from .jobs import Digest, Job, Output, Step
from .status import TransformerStatus

_Regions = Annotated[list[RegionId], Meta(max_length=limits.COMPONENTS)]


class Opened(Message, frozen=True, tag="opened"):
    """Regions were mapped or unmapped."""


Outcome = Done | Opened | Probed | Output | Step | Failed


class NextTask(Message, frozen=True, tag="next-task", kw_only=True):
    """A rank waits for work; frames of the outcome follow. Answered by a task when there is one."""

    task: Count = 0  # that the outcome belongs to; 0: none yet
    outcome: Outcome | None = None
    copied: Bytes = 0  # that the rank holds of components in host memory, on its own device
    transformers: Annotated[list[TransformerStatus], Meta(max_length=limits.TRANSFORMERS)] = (
        msgspec.field(default_factory=list)
    )
    by_nccl: Name | None = None  # why it exchanges by NCCL, where copy engines should


class ProbeTask(Message, frozen=True, tag="probe-task", kw_only=True):
    """Open the region, read or write these bytes. Outcome :class:`Probed`."""

    task: Count
    grant: RegionGrant
    offset: Bytes
    length: Annotated[int, Meta(ge=1, le=limits.PROBE)]
    write: Annotated[bytes, Meta(max_length=limits.PROBE)] | None = None


class OpenedRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A component and the region that it lies in."""

    grant: RegionGrant
    component: Component


class ScratchGrant(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank needs to map a scratch region of a client's session."""

    session: Name
    number: Count
    nbytes: Annotated[int, Meta(ge=limits.SCRATCH_ALIGNMENT, le=limits.SCRATCH)]
    descriptor: Count


class OpenTask(Message, frozen=True, tag="open-task", kw_only=True):
    """Map regions of components, or a scratch region, and keep them mapped. Outcome Opened."""

    task: Count
    regions: Annotated[
        list[OpenedRegion], Meta(max_length=limits.JOB_COMPONENTS + limits.JOB_ADAPTERS)
    ] = msgspec.field(default_factory=list)
    scratch: ScratchGrant | None = None


class CloseTask(Message, frozen=True, tag="close-task", kw_only=True):
    """Forget everything that views these regions, and unmap them. Outcome :class:`Opened`."""

    task: Count
    regions: _Regions


class TurnTask(Message, frozen=True, tag="turn-task", kw_only=True):
    """One turn of a job: the first, with everything it needs, or the next one of a job begun.

    Outcome :class:`Output` when the job is done (frames from rank 0 only), :class:`Step` when it
    needs another turn. Raw frames of inline tensors follow.
    """

    task: Count
    job: Count
    session: Name  # whose digests and runs these are
    body: Job | None = None  # None: go on
    regions: Annotated[
        dict[Fingerprint, RegionId],
        Meta(max_length=limits.JOB_COMPONENTS + limits.JOB_ADAPTERS),
    ] = msgspec.field(default_factory=dict)
    forget: Annotated[list[tuple[Name, Digest]], Meta(max_length=limits.KEPT_TENSORS)] = (
        msgspec.field(default_factory=list)
    )


class DropTask(Message, frozen=True, tag="drop-task", kw_only=True):
    """Forget unfinished jobs, scratch regions, and everything that is kept for ended sessions."""

    task: Count
    jobs: Annotated[list[Count], Meta(max_length=limits.JOBS)] = msgspec.field(default_factory=list)
    sessions: Annotated[list[Name], Meta(max_length=limits.SESSIONS)] = msgspec.field(
        default_factory=list
    )
    scratches: Annotated[list[tuple[Name, Count]], Meta(max_length=limits.SCRATCHES)] = (
        msgspec.field(default_factory=list)
    )


class CompileTask(Message, frozen=True, tag="compile-task", kw_only=True):
    """Compile one piece of a transformer that waits for it, each rank by itself."""

    task: Count


class TrimTask(Message, frozen=True, tag="trim-task", kw_only=True):
    """Free what can be had again, and return cached device memory to the system."""

    task: Count


Task = ProbeTask | OpenTask | CloseTask | TurnTask | DropTask | CompileTask | TrimTask
