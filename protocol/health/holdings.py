"""Who uses the daemon and what it holds: ranks, clients, leases, and memory without an owner."""

from __future__ import annotations

from .. import messages as m
from .check import Finding, failed, passed, skipped, warning
from .units import human_age, human_bytes
from .visit import Visit

_LONG_FILL_SECONDS = 60.0  # 20 GB from a slow disk
_LISTED = 8


def check_ranks(visit: Visit) -> Finding:
    """Every rank is ready."""
    ranks = visit.fresh_status().ranks
    if not ranks:
        return skipped("this daemon keeps no ranks")
    for rank in ranks:
        if rank.state == "failed":
            return failed(
                f"rank {rank.rank} on {rank.device} failed after {rank.starts} starts: "
                f"{rank.error}",
                "the daemon's log has its last words; then restart the daemon",
            )
    starting = [str(rank.rank) for rank in ranks if rank.state == "starting"]
    if starting:
        return warning(
            f"rank {', '.join(starting)} of {len(ranks)} is still starting",
            "wait for it: `xdit-sidecar ipc health-check --wait ready`",
        )
    return passed(f"{len(ranks)} ready")


def check_clients(visit: Visit) -> Finding:
    """What each client said of its torch and allocator, and what that means."""
    clients = [s for s in visit.report.sessions if s.session != visit.opened.welcome.session]
    if not clients:
        return passed("none but this one")
    lines = [describe_client(client) for client in clients[:_LISTED]]
    if len(clients) > _LISTED:
        lines.append(f"and {len(clients) - _LISTED} more (`xdit-sidecar status`)")
    return passed("; ".join(lines))


def describe_client(client: m.SessionStatus) -> str:
    """One client on one line."""
    hello = client.hello
    facts = [
        f"{client.session} {hello.host or hello.name} (pid {client.pid}, uid {client.uid})",
        f"torch {hello.torch}" if hello.torch else "no torch",
        f"allocator {hello.allocator}" if hello.allocator else "",
        "dynamic VRAM" if hello.dynamic_vram else "",
        f"{client.leases} leases",
    ]
    line = ", ".join(fact for fact in facts if fact)
    return f"{line}: {'; '.join(client.meaning)}" if client.meaning else line


def check_ownership(visit: Visit) -> Finding:
    """Every lease has a session, every region an owner, and nothing is stuck on its way."""
    now = visit.fresh_status()
    problems, fixes = [], []
    for device in now.devices:
        if device.orphaned:
            problems.append(
                f"{human_bytes(device.orphaned)} on {device.device} are orphaned: their keeper "
                "died while clients held them"
            )
            fixes.append("clients move off orphans at their next load; restart those that do not")
    sessions = {session.session for session in now.sessions}
    for component in now.components:
        name = f"{component.label} ({human_bytes(component.nbytes)} on {component.device})"
        if not sessions.issuperset(component.sessions):
            problems.append(f"{name} is leased by a session that has ended")
            fixes.append("restart the daemon and report this")
        if (seconds := _filling_for(component)) > _LONG_FILL_SECONDS:
            problems.append(f"{name} has been {component.state} for {human_age(seconds)}")
            fixes.append("the client that fills it hangs or reads from a slow disk: end it")
        if component.state == "freeing" and _was_freeing(visit.report, component):
            problems.append(f"{name} is being freed for longer than this check took so far")
            fixes.append("its keeper hangs; the daemon ends it within 10 s")
    leases = sum(session.leases for session in now.sessions)
    held = sum(component.nbytes for component in now.components)
    idle = sum(c.nbytes for c in now.components if c.state == "resident" and not c.sessions)
    detail = (
        f"{len(now.sessions)} sessions, {leases} leases, {len(now.components)} components with "
        f"{human_bytes(held)}, of which nobody uses {human_bytes(idle)} now"
    )
    if problems:
        return warning("; ".join([*problems, detail]), "; ".join(dict.fromkeys(fixes)))
    return passed(detail)


def _filling_for(component: m.ComponentStatus) -> float:
    if component.state in ("allocating", "filling", "sealing"):
        return component.idle_seconds or 0.0
    return 0.0


def _was_freeing(before: m.Status, component: m.ComponentStatus) -> bool:
    return any(
        (old.fingerprint, old.device, old.state)
        == (component.fingerprint, component.device, "freeing")
        for old in before.components
    )
