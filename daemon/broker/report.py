"""The status report: what the broker knows, as one message. It holds no handle and no token."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from ... import __version__
from ...protocol import limits
from ...protocol import messages as m
from ...protocol.version import PROTOCOL_VERSION
from .copy import Copy
from .keeper_link import KeeperLink
from .sessions import Session

if TYPE_CHECKING:
    from .broker import Broker


def build_status(broker: Broker) -> m.Status:
    """The state of everything, now."""
    now = time.monotonic()
    copies = list(broker.catalog.copies.values())
    return m.Status(
        daemon=__version__,
        protocol=str(PROTOCOL_VERSION),
        boot_id=broker.boot_id,
        pid=os.getpid(),
        uid=os.geteuid(),
        uptime_seconds=now - broker.started,
        devices=[_device(broker, keeper) for keeper in broker.keepers.values()],
        components=[_component(now, copy) for copy in copies[: limits.COMPONENTS]],
        sessions=[_session(broker, now, session) for session in broker.sessions.open.values()],
        ranks=_ranks(broker),
        group=_group(broker),
        no_gpu=broker.settings.no_gpu[: limits.TEXT],
    )


def _ranks(broker: Broker) -> list[m.RankStatus]:
    group, lines = broker.group, []
    for rank, device in enumerate(group.devices):
        link = group.links[rank] if rank < len(group.links) else None
        ready = link is not None and link.state == "ready"
        lines.append(
            m.RankStatus(
                rank=rank,
                device=device,
                pid=link.pid if link is not None and link.state != "ended" else None,
                state="failed" if group.state == "degraded" else "ready" if ready else "starting",
                error=group.error or (link.error if link else None),
                starts=group.starts,
                copied=link.copied if ready and link is not None else 0,
                transformers=link.transformers if ready and link is not None else [],
            )
        )
    return lines


def _group(broker: Broker) -> m.GroupStatus | None:
    group, service = broker.group, broker.service
    if not group.devices:
        return None
    return m.GroupStatus(
        state=group.state,
        error=group.error,
        backend=group.backend,
        by_nccl=next((link.by_nccl for link in group.links if link.by_nccl), None),
        deadline_seconds=group.deadline,
        jobs=len(service.jobs),
        kept_tensors=len(service.kept),
        kept_bytes=service.kept.nbytes,
    )


def _device(broker: Broker, keeper: KeeperLink) -> m.DeviceStatus:
    copies = [c for c in broker.catalog.copies.values() if c.key.device == keeper.device]
    orphaned = sum(copy.nbytes for copy in copies if copy.state == "orphaned")
    report = keeper.report
    return m.DeviceStatus(
        device=keeper.device,
        name=report.name if report else "",
        kind="memfd" if keeper.device == "cpu" else "cuda_ipc",
        state=keeper.state,
        error=keeper.error,
        keeper_pid=keeper.pid,
        keeper_starts=keeper.starts,
        total=report.total if report else 0,
        free=report.free if report else 0,
        budget=broker.catalog.budgets[keeper.device] or 0,
        regions=sum(copy.nbytes for copy in copies) - orphaned,
        orphaned=orphaned,
        context=report.context if report else 0,
    )


def _component(now: float, copy: Copy) -> m.ComponentStatus:
    holders = copy.holders
    return m.ComponentStatus(
        role=copy.component.role,
        label=copy.component.label,
        fingerprint=copy.key.fingerprint,
        device=copy.key.device,
        nbytes=copy.nbytes,
        state=copy.state,
        uid=copy.uid,
        sessions=holders[: limits.SESSIONS],
        # Also while it is being filled: then since the hand-over began.
        idle_seconds=None if holders or copy.state == "freeing" else now - copy.last_used,
        filled=copy.filled,
    )


def _session(broker: Broker, now: float, session: Session) -> m.SessionStatus:
    return m.SessionStatus(
        session=session.name,
        uid=session.peer.uid,
        pid=session.peer.pid,
        hello=session.hello,
        leases=broker.catalog.leases_of(session.name),
        age_seconds=now - session.opened,
        meaning=explain_client(session),
    )


def explain_client(session: Session) -> list[str]:
    """What a client's own description means for sharing with it."""
    hello, lines = session.hello, []
    if hello.allocator == "cudaMallocAsync":
        lines.append(
            "torch's allocator (cudaMallocAsync) cannot export its memory: components are copied "
            "once into a region of the daemon and shared from there"
        )
    if hello.dynamic_vram:
        lines.append(
            "dynamic VRAM is on: this package's loaders share as usual; objects that other nodes "
            "loaded are shared through their files"
        )
    if hello.pid != session.peer.pid:
        lines.append(
            "runs in another PID namespace (a container): CUDA IPC may be refused there; "
            "run the health-check inside it"
        )
    return lines
