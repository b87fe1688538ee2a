"""What travels on a session stream, in either direction."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .fields import Count, Device, Message, Name, RegionId, Text, Token


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
