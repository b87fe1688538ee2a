"""The health-check's question: does a keeper or a rank see the bytes that a client wrote?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...protocol import messages as m
from ...protocol.errors import ProbeFailed, SidecarError
from ..keeper import messages as k
from .events import Asker
from .rank_link import Result
from .sessions import Session

if TYPE_CHECKING:
    from .broker import Broker


def probe_region(broker: Broker, session: Session, asker: Asker, probe: m.Probe) -> None:
    """Read or write bytes of a region that the asker itself is filling, and answer Probed.

    Raises UnknownComponent for any other region and ProbeFailed for an unknown reader.
    """
    copy = broker.catalog.fill_of(session.name, probe.region)
    device = copy.key.device

    def answered(body: k.KeeperAnswerBody) -> None:
        match body:
            case k.RegionBytes(data):
                broker.answer(asker, m.Probed(data))
            case k.KeeperFailed(message=message):
                refuse(ProbeFailed(message))
            case _:
                broker.answer(asker, m.Probed(b""))

    def refuse(error: SidecarError) -> None:
        broker.answer(asker, m.failed_answer(error))

    def finished(future: asyncio.Future[Result]) -> None:
        if future.cancelled():
            return
        if isinstance(error := future.exception(), SidecarError):
            refuse(ProbeFailed(str(error)))
            return
        match future.result().outcome:
            case m.Failed(message=message):
                refuse(ProbeFailed(message))
            case m.Probed() as probed:
                broker.answer(asker, probed)

    def lost() -> None:
        refuse(ProbeFailed(f"the keeper of {device} died at it; the daemon's log says why"))

    if probe.reader == "keeper":
        ask: k.ReadRegion | k.WriteRegion = (
            k.ReadRegion(probe.region, probe.offset, probe.length)
            if probe.write is None
            else k.WriteRegion(probe.region, probe.offset, probe.write)
        )
        broker.ask(device, ask, answered, lost)
        return
    index = int(probe.reader.removeprefix("rank"))
    group = broker.group
    if index >= len(group.devices):
        raise ProbeFailed(f"there is no rank {index}: this daemon has {len(group.devices)}")
    if group.state != "ready" or (reader := group.links[index].session) is None:
        raise ProbeFailed(f"rank {index} is {group.state}: {group.error or 'not ready yet'}")
    rank = group.links[index]

    def granted(grant: m.RegionGrant) -> None:
        task = m.ProbeTask(
            task=rank.new_task(),
            grant=grant,
            offset=probe.offset,
            length=probe.length,
            write=probe.write,
        )
        rank.give(task).add_done_callback(finished)

    broker.grants.give(reader, device, probe.region, copy.nbytes, granted, refuse)
