"""What happens to the catalog, and what the catalog wants done. Data only.

The broker turns messages, ended sessions and keepers' answers into events, gives them to
:class:`.catalog.Catalog`, and carries out the instructions that come back, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ...protocol.errors import SidecarError
from ...protocol.messages import Component


class Key(NamedTuple):
    """What makes two hand-overs the same component."""

    domain: str  # uids that trust each other share one
    fingerprint: str
    device: str

    @property
    def is_probe(self) -> bool:
        """Of a region that is filled to be probed, and never committed."""
        return self.fingerprint.startswith("nonce:")


class Asker(NamedTuple):
    """A request that waits for an answer."""

    session: str
    request: int


# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandOverAsked:
    asker: Asker
    key: Key
    component: Component
    uid: int
    progress: bool = False  # wants TellProgress while it waits


@dataclass(frozen=True, slots=True)
class AttachAsked:
    asker: Asker
    key: Key


@dataclass(frozen=True, slots=True)
class FillProgressed:
    asker: Asker
    region: str
    nbytes: int  # filled by now


@dataclass(frozen=True, slots=True)
class CommitAsked:
    asker: Asker
    region: str


@dataclass(frozen=True, slots=True)
class AbandonAsked:
    asker: Asker
    region: str


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    asker: Asker
    lease: str


@dataclass(frozen=True, slots=True)
class EvictAsked:
    asker: Asker
    key: Key


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The asker gave up, or what it was granted could not be delivered."""

    asker: Asker


@dataclass(frozen=True, slots=True)
class SessionEnded:
    session: str


@dataclass(frozen=True, slots=True)
class RegionAllocated:
    region: str


@dataclass(frozen=True, slots=True)
class AllocationRefused:
    region: str
    free: int  # bytes that the device could have given
    error: SidecarError | None = None  # set when the refusal is not about memory


@dataclass(frozen=True, slots=True)
class RegionSealed:
    region: str


@dataclass(frozen=True, slots=True)
class SealRefused:
    region: str
    error: SidecarError


@dataclass(frozen=True, slots=True)
class RegionFreed:
    region: str


@dataclass(frozen=True, slots=True)
class KeeperReady:
    device: str
    budget: int  # bytes that regions of this device may take together


@dataclass(frozen=True, slots=True)
class KeeperLost:
    device: str


@dataclass(frozen=True, slots=True)
class RoomWanted:
    """A job found the device full: evict what nobody leases, but for these regions."""

    device: str
    keep: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed; idle components may go."""


Event = (
    HandOverAsked
    | AttachAsked
    | FillProgressed
    | CommitAsked
    | AbandonAsked
    | ReleaseAsked
    | EvictAsked
    | RequestCancelled
    | SessionEnded
    | RegionAllocated
    | AllocationRefused
    | RegionSealed
    | SealRefused
    | RegionFreed
    | KeeperReady
    | KeeperLost
    | RoomWanted
    | Ticked
)


# --- instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Allocate:
    """Ask the device's keeper for a region; answer with RegionAllocated or AllocationRefused."""

    device: str
    region: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Seal:
    """Ask the keeper to seal; answer with RegionSealed or SealRefused."""

    device: str
    region: str


@dataclass(frozen=True, slots=True)
class Free:
    """Ask the keeper to free; answer with RegionFreed."""

    device: str
    region: str


@dataclass(frozen=True, slots=True)
class Unmap:
    """Nobody leases this region any more, and its keeper is gone: let go of it."""

    region: str


@dataclass(frozen=True, slots=True)
class GrantFill:
    """Send the asker the region to fill."""

    asker: Asker
    device: str
    region: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class GrantLease:
    """Send the asker the sealed region and its lease."""

    asker: Asker
    device: str
    region: str
    nbytes: int
    lease: str
    component: Component = field(repr=False)


@dataclass(frozen=True, slots=True)
class TellProgress:
    """Tell an asker, who waits, how far the filler is."""

    asker: Asker
    filled: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Confirm:
    """Tell the asker that it is so."""

    asker: Asker


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the asker with this error."""

    asker: Asker
    error: SidecarError


@dataclass(frozen=True, slots=True)
class NotifyOrphaned:
    """Tell a lease holder that its region's keeper is gone."""

    session: str
    region: str


@dataclass(frozen=True, slots=True)
class Note:
    """One line for the log: an event name and its facts."""

    event: str
    facts: tuple[tuple[str, str | int], ...]
    level: Literal["info", "warning"] = "info"


Instruction = (
    Allocate
    | Seal
    | Free
    | Unmap
    | GrantFill
    | GrantLease
    | TellProgress
    | Confirm
    | Refuse
    | NotifyOrphaned
    | Note
)
