"""Who has to go so that something fits, and what to say when it cannot. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...protocol import limits
from ...protocol.errors import Busy, OutOfMemory
from ...protocol.messages import Component
from .copy import Copy


def choose_victims(evictable: Iterable[Copy], missing: int) -> list[Copy] | None:
    """The least recently used copies that together free ``missing`` bytes; None if too few."""
    victims = []
    for copy in sorted(evictable, key=lambda copy: copy.last_used):
        if missing <= 0:
            break
        victims.append(copy)
        missing -= copy.nbytes
    return victims if missing <= 0 else None


def choose_crowd(
    kept: Sequence[Copy], evictable: Iterable[Copy], component: Component
) -> list[Copy]:
    """The idle copies that must go so that the daemon can keep track of one more component.

    Least recently used first. Raises Busy when too many are in use.
    """
    copies = len(kept) + 1
    tensors = sum(len(copy.component.tensors) for copy in kept) + len(component.tensors)
    crowd = []
    for idle in sorted(evictable, key=lambda copy: copy.last_used):
        if copies <= limits.COMPONENTS and tensors <= limits.CATALOG_TENSORS:
            break
        crowd.append(idle)
        copies, tensors = copies - 1, tensors - len(idle.component.tensors)
    if copies > limits.COMPONENTS:
        raise Busy(f"{limits.COMPONENTS} components are in use: close clients or evict some")
    if tensors > limits.CATALOG_TENSORS:
        raise Busy(
            f"the components in use and this one have {tensors} tensors, the daemon keeps at most "
            f"{limits.CATALOG_TENSORS}: close clients or evict some"
        )
    return crowd


def name_holders(device: str, copies: Iterable[Copy]) -> str:
    """Who keeps what on a device from being evicted; "" if nobody does."""
    leased = [
        f"{copy.component.label} ({copy.nbytes} bytes, used by {', '.join(copy.holders)})"
        for copy in copies
        if copy.key.device == device and copy.leases
    ]
    return f"in use and not evictable: {'; '.join(leased[:8])}" if leased else ""


def explain_refusal(
    component: Component, nbytes: int, device: str, free: int, copies: Iterable[Copy]
) -> OutOfMemory:
    """The error for ``nbytes`` that do not fit: who holds how much, and what can be done."""
    held = name_holders(device, copies)
    text = (
        f"{component.label} needs {nbytes} bytes on {device}, {max(0, free)} can be had"
        f"{f'; {held}' if held else ''}. "
        "Options: an fp8 file, fewer resident components, the text encoder on the CPU, a larger "
        "--budget or smaller --reserve of the daemon, or another GPU"
    )
    return OutOfMemory(text[: limits.TEXT])
