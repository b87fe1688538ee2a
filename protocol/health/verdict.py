"""Whether a daemon is well, by its own report: the one judgement of all who show it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .. import messages as m

Health = Literal["ready", "starting", "degraded"]


class Failure(NamedTuple):
    """A part of the daemon that has failed for good, and its last error."""

    of: Literal["device", "ranks"]
    where: str  # the devices' names
    error: str


def find_failures(status: m.Status) -> list[Failure]:
    """What does not work, and will not by itself."""
    found = [
        Failure("device", device.device, device.error or "no reason is known")
        for device in status.devices
        if device.state == "failed"
    ]
    # The ranks fail together: each of them says so, and the group says why.
    group = status.group
    if group is not None and group.state == "degraded":
        where = ", ".join(dict.fromkeys(rank.device for rank in status.ranks))
        found.append(Failure("ranks", where, group.error or "no reason is known"))
    return found


def judge(status: m.Status) -> Health:
    """The worst of devices and ranks."""
    if find_failures(status):
        return "degraded"
    states = [device.state for device in status.devices]
    if status.group is not None:
        states.append("ready" if status.group.state == "ready" else "starting")
    return "starting" if "starting" in states else "ready"
