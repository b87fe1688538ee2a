"""Every message of the protocol, as typed structures.

Three unions: what travels on a session stream in either direction, what a client asks over the
control socket, and what the daemon answers. A request and its answer are paired by ``id`` inside
an envelope; :class:`Failed` may answer any request. Adding an optional field or a new member is a
minor version; anything else is a major one.

Handles, tokens and file descriptors are in here and nowhere else: the structures that carry them
hide them from ``repr``, so that they never reach a log.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from . import limits
from .errors import SidecarError
from .manifest import Manifest

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


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all: tagged by class name."""


# --- session stream -------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello", kw_only=True):
    """First message of a client, after the preamble. What it tells is shown by ``status``."""

    name: Name
    pid: Count  # in the client's own PID namespace; the kernel tells the daemon the other one
    python: Name = ""
    torch: Name | None = None
    cuda: Name | None = None
    allocator: Name | None = None  # "native", "cudaMallocAsync"
    dynamic_vram: bool | None = None
    host: Name | None = None  # "ComfyUI 0.3.75"
    pid_namespace: Count | None = None  # inode of /proc/self/ns/pid


class Welcome(Message, frozen=True, tag="welcome", kw_only=True):
    """The session is open; ``token`` binds ZeroMQ requests to it."""

    session: Name
    token: Token
    boot_id: Name
    daemon: Name  # its package version
    devices: Annotated[list[Device], Meta(max_length=64)]

    def __repr__(self) -> str:
        return f"Welcome(session={self.session!r}, boot_id={self.boot_id!r}, token=<hidden>)"


class Refused(Message, frozen=True, tag="refused"):
    """The session is not opened, or ends; readable by clients of every major version."""

    code: Name
    message: Text


class Descriptor(Message, frozen=True, tag="descriptor"):
    """Carries one file descriptor (SCM_RIGHTS), named by an answer on the control socket."""

    number: Count
    request: Count = 0  # whose answer names it; a client that withdrew the request drops it


class RegionOrphaned(Message, frozen=True, tag="region-orphaned"):
    """The keeper of a region that this session leases died; the mapping stays valid."""

    region: RegionId


StreamMessage = Hello | Welcome | Refused | Descriptor | RegionOrphaned


# --- regions and components -----------------------------------------------------------------------


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


# --- requests over the control socket -------------------------------------------------------------


class Ping(Message, frozen=True, tag="ping"):
    """Answered by :class:`Pong`."""


class HandOver(Message, frozen=True, tag="hand-over", kw_only=True):
    """I have this component. Answered by :class:`Fill` or, as soon as it is there, Attached."""

    device: Device
    component: Component


class Attach(Message, frozen=True, tag="attach", kw_only=True):
    """Answered by :class:`Attached`, or Failed(unknown-component) when it is not resident."""

    device: Device
    fingerprint: Fingerprint


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


class GetStatus(Message, frozen=True, tag="status"):
    """Answered by :class:`Status`."""


class CancelRequest(Message, frozen=True, tag="cancel"):
    """Withdraw one of our unanswered requests, by its id. Answered by :class:`Done`."""

    request: Count


class AwaitTask(Message, frozen=True, tag="await-task"):
    """A rank waits for work. Answered by :class:`ProbeTask` when there is some."""


class FinishTask(Message, frozen=True, tag="finish-task", kw_only=True):
    """A rank's result. Answered by :class:`Done`."""

    task: Count
    data: Annotated[bytes, Meta(max_length=limits.PROBE)] = b""
    error: Text | None = None


RequestBody = (
    Ping
    | HandOver
    | Attach
    | Commit
    | Abandon
    | Release
    | Evict
    | Probe
    | GetStatus
    | CancelRequest
    | AwaitTask
    | FinishTask
)


class Request(msgspec.Struct, frozen=True):
    """The envelope of a request."""

    token: Token
    id: Count
    body: RequestBody

    def __repr__(self) -> str:
        return f"Request(id={self.id}, body={self.body!r}, token=<hidden>)"


class RequestId(msgspec.Struct, frozen=True):
    """What can still be read of a request that is not understood, so that its answer finds it."""

    id: Count = 0


# --- answers --------------------------------------------------------------------------------------


class Pong(Message, frozen=True, tag="pong"):
    """The daemon's loop is alive."""

    boot_id: Name


class Fill(Message, frozen=True, tag="fill", kw_only=True):
    """Nobody has it: map the region, copy the tensors in, synchronise, commit."""

    grant: RegionGrant


class Attached(Message, frozen=True, tag="attached", kw_only=True):
    """The component is resident; the lease keeps it so."""

    lease: LeaseId
    grant: RegionGrant
    component: Component


class Done(Message, frozen=True, tag="done"):
    """It is so."""


class Probed(Message, frozen=True, tag="probed"):
    """What the reader read (empty after a write)."""

    data: Annotated[bytes, Meta(max_length=limits.PROBE)]


class ProbeTask(Message, frozen=True, tag="probe-task", kw_only=True):
    """Work for a rank: open the region, read or write these bytes."""

    task: Count
    grant: RegionGrant
    offset: Bytes
    length: Annotated[int, Meta(ge=1, le=limits.PROBE)]
    write: Annotated[bytes, Meta(max_length=limits.PROBE)] | None = None


class Failed(Message, frozen=True, tag="failed"):
    """The request was refused; see :mod:`.errors` for the codes."""

    code: Name
    message: Text


def failed_answer(error: SidecarError) -> Failed:
    """An error as an answer, no longer than a receiver accepts."""
    return Failed(error.code, str(error)[: limits.TEXT])


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device and the keeper of its regions. Sizes in bytes."""

    device: Device
    name: Name
    kind: RegionKind
    state: Literal["starting", "ready", "failed"]
    error: Text | None = None
    keeper_pid: Count | None = None
    keeper_starts: Count = 0
    total: Bytes = 0
    free: Bytes = 0
    budget: Bytes = 0
    regions: Bytes = 0
    orphaned: Bytes = 0
    context: Bytes = 0  # device memory that the keeper's CUDA context costs


class ComponentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a component on one device."""

    role: Role
    label: Name
    fingerprint: Fingerprint
    device: Device
    nbytes: Bytes
    state: Literal["allocating", "filling", "sealing", "resident", "orphaned", "freeing"]
    uid: Count
    sessions: Annotated[list[Name], Meta(max_length=limits.LEASES_PER_SESSION)]
    idle_seconds: float | None = None


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client: what the kernel says of it, what it says itself, and what that means."""

    session: Name
    uid: Count
    pid: Count
    hello: Hello
    leases: Count
    age_seconds: float
    meaning: Annotated[list[Text], Meta(max_length=8)] = []


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rank process."""

    rank: Count
    device: Device
    pid: Count | None
    state: Literal["starting", "ready", "failed"]
    error: Text | None = None
    starts: Count = 0


class Status(Message, frozen=True, tag="status-report", kw_only=True):
    """What is resident, where, how big, and who holds it."""

    daemon: Name
    protocol: Name
    boot_id: Name
    pid: Count
    uid: Count
    uptime_seconds: float
    devices: Annotated[list[DeviceStatus], Meta(max_length=64)]
    components: Annotated[list[ComponentStatus], Meta(max_length=limits.COMPONENTS)]
    sessions: Annotated[list[SessionStatus], Meta(max_length=limits.SESSIONS)]
    ranks: Annotated[list[RankStatus], Meta(max_length=64)] = []


AnswerBody = Pong | Fill | Attached | Done | Probed | ProbeTask | Failed | Status


class Answer(msgspec.Struct, frozen=True):
    """The envelope of an answer."""

    id: Count
    body: AnswerBody


# --- bulk socket ----------------------------------------------------------------------------------


class Echo(Message, frozen=True, tag="echo"):
    """Send the raw frames back unchanged: the health-check's measure of the bulk path."""


BulkBody = Echo


class BulkRequest(msgspec.Struct, frozen=True):
    """First frame of a bulk message; the raw frames follow."""

    token: Token
    id: Count
    body: BulkBody

    def __repr__(self) -> str:
        return f"BulkRequest(id={self.id}, body={self.body!r}, token=<hidden>)"


class BulkAnswer(msgspec.Struct, frozen=True):
    """First frame of a bulk answer; the raw frames follow."""

    id: Count
    body: Done | Failed
