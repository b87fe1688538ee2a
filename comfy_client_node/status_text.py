"""The daemon's status in a few lines."""

from __future__ import annotations

from ..protocol import messages as m
from ..protocol.health.units import human_bytes


def describe(status: m.Status) -> str:
    """Ranks, components and devices, a line each."""
    names = {s.session: s.hello.host or s.hello.name for s in status.sessions}
    lines = [f"xdit-sidecar {status.daemon}, pid {status.pid}"]
    group = status.group
    if group is None:
        lines.append("no ranks")
    else:
        lines.append(f"{len(status.ranks)} ranks, {group.state}, {group.jobs} jobs")
        lines += [group.error] if group.error else []
        lines += [
            f"rank {rank.rank}: {human_bytes(rank.copied)} copied to {rank.device}, of components "
            "in host memory"
            for rank in status.ranks
            if rank.copied
        ]
    for component in status.components:
        users = sorted({names.get(session, session) for session in component.sessions})
        lines.append(
            f"{component.role}: {component.label} on {component.device}, "
            f"{human_bytes(component.nbytes)}, {component.state}, "
            f"used by {', '.join(users) or 'nobody'}"
        )
    for device in status.devices:
        lines.append(
            f"{device.device}: {device.state}, {human_bytes(device.regions)} of components, "
            f"{human_bytes(device.free)} free"
        )
    return "\n".join(lines)
