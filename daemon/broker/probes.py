"""The health-check's question: does a keeper or a rank see the bytes that a client wrote?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...protocol import messages as m
from ...protocol.errors import ProbeFailed, SidecarError
from ..keeper import messages as k
from .events import Asker
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

    def finished(future: asyncio.Future[bytes]) -> None:
        if future.cancelled():
            return
        if isinstance(error := future.exception(), SidecarError):
            refuse(error)
        else:
            broker.answer(asker, m.Probed(future.result()))

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
    if index >= len(broker.ranks):
        raise ProbeFailed(f"there is no rank {index}: this daemon has {len(broker.ranks)}")
    rank = broker.ranks[index]
    if rank.session is None:
        raise ProbeFailed(f"rank {index} is {rank.state}: {rank.error or 'not ready yet'}")
    broker.grant_to(
        rank.session,
        device,
        probe.region,
        copy.nbytes,
        lambda grant: rank.give(grant, probe).add_done_callback(finished),
        refuse,
    )
