"""Exporting regions to sessions: the handle or the descriptor that opens them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping

from ...protocol import messages as m
from ...protocol.errors import DaemonLost, FillLost, SidecarError, error_from_code
from ..keeper import messages as k
from .gate import Gate
from .keeper_link import Answer, KeeperLink

Granted = Callable[[m.RegionGrant], None]
Failed = Callable[[SidecarError], None]


class Grants:
    """Asks keepers for exports and sends what is a descriptor ahead on the session stream."""

    def __init__(self, keepers: Mapping[str, KeeperLink], gate: Gate) -> None:
        self._keepers = keepers
        self._gate = gate

    def give(
        self,
        session: str,
        device: str,
        region: str,
        nbytes: int,
        granted: Granted,
        failed: Failed,
        *,
        request: int = 0,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Call ``granted`` with the grant of a region for a session, or ``failed``.

        ``request`` is the one that this answers, if any; ``wanted`` is asked at the last moment
        whether anybody still waits.
        """

        def exported(future: asyncio.Future[Answer]) -> None:
            if future.cancelled():
                return
            if future.exception() is not None:
                failed(FillLost(f"the keeper of {device} died: hand over again"))
                return
            body, descriptor = future.result()
            try:
                if not wanted():
                    raise DaemonLost("the asker gave up")
                grant = self._grant(session, device, region, nbytes, body, descriptor, request)
            except SidecarError as error:
                if descriptor is not None:
                    os.close(descriptor)
                failed(error)
            else:
                granted(grant)

        self._keepers[device].ask(k.ExportRegion(region)).add_done_callback(exported)

    async def obtain(self, session: str, device: str, region: str, nbytes: int) -> m.RegionGrant:
        """The grant of a region for a session. Raises SidecarError."""
        future: asyncio.Future[m.RegionGrant] = asyncio.get_running_loop().create_future()
        self.give(session, device, region, nbytes, future.set_result, future.set_exception)
        return await future

    def send(self, session: str, descriptor: int, request: int = 0) -> int:
        """Send a descriptor ahead of what names it: its number. Takes it over.

        Raises DaemonLost if the session ended.
        """
        connection = self._gate.connection_of(session)
        if connection is None:
            os.close(descriptor)
            raise DaemonLost("the session ended")
        return connection.send_descriptor(descriptor, request)

    def _grant(
        self,
        session: str,
        device: str,
        region: str,
        nbytes: int,
        body: k.KeeperAnswerBody,
        descriptor: int | None,
        request: int,
    ) -> m.RegionGrant:
        if isinstance(body, k.KeeperFailed):
            raise error_from_code(body.code, body.message)
        if not isinstance(body, k.Exported) or self._gate.connection_of(session) is None:
            raise DaemonLost("the session ended")
        number = None
        if descriptor is not None:
            number = self.send(session, descriptor, request)
        return m.RegionGrant(
            region=region,
            kind="memfd" if body.handle is None else "cuda_ipc",
            device=device,
            nbytes=nbytes,
            handle=body.handle,
            descriptor=number,
        )
