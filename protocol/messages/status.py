"""The status report."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .. import limits
from .fields import Bytes, Count, Device, Fingerprint, Message, Name, RegionKind, Role, Text
from .jobs import ComputeDtype
from .stream import Hello


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
    filled: Bytes = 0  # as its filler says, while it is filled; then all


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One client: what the kernel says of it, what it says itself, and what that means."""

    session: Name
    uid: Count
    pid: Count
    hello: Hello
    leases: Count
    age_seconds: float
    meaning: Annotated[list[Text], Meta(max_length=8)] = []


class TransformerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a rank runs the forwards of a transformer in one dtype, with LoRAs or without."""

    label: Name
    compute: ComputeDtype
    fp8_matmul: bool = False
    lora: bool = False  # since 1.2
    state: Literal["eager", "compiling", "compiled", "refused"]  # "compiling": or waits for it
    reason: Name | None = None  # why it is refused
    # Kinds of forwards that the GPU repeats as one; since 1.2.
    recorded: Count = 0
    not_recorded: Name | None = None  # why none is any more


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rank process."""

    rank: Count
    device: Device
    pid: Count | None
    state: Literal["starting", "ready", "failed"]
    error: Text | None = None
    starts: Count = 0
    copied: Bytes = 0  # on its device: components that lie in host memory, weights in fp8
    # Those that it may compile; others run eagerly.
    transformers: Annotated[list[TransformerStatus], Meta(max_length=limits.TRANSFORMERS)] = (
        msgspec.field(default_factory=list)
    )


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks as a group, and what they have to do."""

    state: Literal["starting", "ready", "degraded"]
    error: Text | None = None
    backend: Literal["gloo", "nccl"]
    by_nccl: Name | None = None  # why that exchanges, where copy engines should; since 1.2
    deadline_seconds: float
    jobs: Count  # waiting or running
    kept_tensors: Count  # named by digest
    kept_bytes: Bytes  # of them, on each rank


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
    ranks: Annotated[list[RankStatus], Meta(max_length=limits.RANKS)] = msgspec.field(
        default_factory=list
    )
    group: GroupStatus | None = None
    no_gpu: Text = ""  # why no GPU is served although a driver is installed
