"""What the status panel in the browser shows: the daemon's status as plain JSON."""

from __future__ import annotations

import msgspec

from ..protocol import messages as m
from ..protocol.health.verdict import Failure, Health, find_failures, judge


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something is wrong. ``code`` is an error's, for a panel that says it in another language."""

    code: str
    problem: str
    what_to_do: str


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon itself."""

    version: str
    protocol: str
    boot_id: str
    pid: int
    uptime_seconds: float


class Sharer(msgspec.Struct, frozen=True, kw_only=True):
    """One process that holds a component; ``this_process`` is the ComfyUI that answers."""

    pid: int
    program: str
    this_process: bool


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One copy of a component on one device. ``size`` and ``filled`` in bytes."""

    name: str
    kind: str
    device: str
    size: int
    filled: int
    state: str
    idle_seconds: float | None
    sharers: list[Sharer]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What ``GET /xdit/status`` answers.

    ``health`` is the worst of devices and ranks; ``notes`` say what this process's allocator and
    memory management mean for sharing; ``queue`` counts jobs that wait or run.
    """

    daemon: Daemon
    health: Health
    problems: list[Problem]
    notes: list[str]
    devices: list[m.DeviceStatus]
    components: list[Component]
    ranks: list[m.RankStatus]
    group: m.GroupStatus | None
    queue: int


def make_report(status: m.Status, own_session: str) -> Report:
    """The daemon's status as the panel shows it; ``own_session`` is this process's."""
    return Report(
        daemon=Daemon(
            version=status.daemon,
            protocol=status.protocol,
            boot_id=status.boot_id,
            pid=status.pid,
            uptime_seconds=status.uptime_seconds,
        ),
        health=judge(status),
        problems=[_problem(failure) for failure in find_failures(status)],
        notes=[n for s in status.sessions if s.session == own_session for n in s.meaning],
        devices=status.devices,
        components=_components(status, own_session),
        ranks=status.ranks,
        group=status.group,
        queue=status.group.jobs if status.group else 0,
    )


def _problem(failure: Failure) -> Problem:
    if failure.of == "device":
        return Problem(
            code="device-failed",
            problem=f"{failure.where} failed: {failure.error}",
            what_to_do="Remove the cause, which the daemon's log tells, then restart the daemon.",
        )
    return Problem(
        code="ranks-degraded",
        problem=f"The ranks failed: {failure.error}",
        what_to_do="Jobs are refused until the daemon is restarted: remove the cause, which its "
        "log tells, then restart it.",
    )


def _components(status: m.Status, own_session: str) -> list[Component]:
    sharers = {
        session.session: Sharer(
            pid=session.pid,
            program=session.hello.host or session.hello.name,
            this_process=session.session == own_session,
        )
        for session in status.sessions
    }
    return [
        Component(
            name=component.label,
            kind=component.role,
            device=component.device,
            size=component.nbytes,
            filled=component.filled,
            state=component.state,
            idle_seconds=component.idle_seconds,
            sharers=[sharers[name] for name in component.sessions if name in sharers],
        )
        for component in status.components
    ]
