"""The broker: messages in, catalog and sessions asked, instructions carried out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable

import zmq

from ... import __version__
from ...protocol import codec, limits
from ...protocol import messages as m
from ...protocol.errors import (
    BadMessage,
    Busy,
    DaemonLost,
    FillLost,
    Internal,
    SidecarError,
    TooLarge,
    Unsupported,
    error_from_code,
)
from ...protocol.peers import Peer
from ..keeper import messages as k
from ..settings import Settings
from . import events as e
from .catalog import Catalog
from .doorman import Doorman
from .gate import Gate
from .keeper_link import Answer, KeeperGone, KeeperLink
from .log import log, logger
from .memory_guard import MemoryGuard
from .probes import probe_region
from .rank_link import RankLink
from .report import build_status
from .router import Router
from .sessions import Session, Sessions

_TICK_SECONDS = 1.0


class Broker:
    """Runs from :meth:`start` to :meth:`close` on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.started = time.monotonic()
        self._opened = contextlib.ExitStack()  # closes what was opened, also after a failed start
        self.catalog = Catalog(list(settings.devices), idle_seconds=settings.idle_seconds)
        self.sessions = Sessions(settings.allowed_uids)
        self.keepers = {device: self._keeper_link(device) for device in settings.devices}
        self.ranks = [self._rank_link(rank) for rank in range(settings.ranks)]
        self._routes: dict[e.Asker, tuple[Router, bytes]] = {}  # where open requests came from

    # --- life

    def start(self) -> None:
        """Open the sockets and start the children. Call on the running event loop.

        Raises OSError or ZMQError; :meth:`close` is to be called then too.
        """
        self._loop = asyncio.get_running_loop()
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zmq.max_sockets = 64
        self._opened.callback(self._zmq.destroy, linger=0)
        endpoints, allowed = self.settings.endpoints, self.settings.allowed_uids
        self._doorman = Doorman(self._zmq, self._has_session)
        self._opened.callback(self._doorman.close)
        self.control = Router(
            self._zmq,
            endpoints.control,
            allowed=allowed,
            shared=self.settings.shared,
            frame_limit=limits.CONTROL_FRAME,
            part_limit=limits.CONTROL_PARTS,
            queue=limits.CONTROL_QUEUE,
            on_message=self._on_control,
            on_overload=self._on_overload,
            doorman=self._doorman,
        )
        self._opened.callback(self.control.close)
        self.bulk = Router(
            self._zmq,
            endpoints.bulk,
            allowed=allowed,
            shared=self.settings.shared,
            frame_limit=limits.BULK_FRAME,
            part_limit=limits.BULK_PARTS,
            queue=limits.BULK_QUEUE,
            on_message=self._on_bulk,
            on_overload=self._on_overload,
            doorman=self._doorman,
        )
        self._opened.callback(self.bulk.close)
        for keeper in self.keepers.values():
            self._opened.callback(keeper.close)
        for rank in self.ranks:
            self._opened.callback(rank.close)
        # Last: who can open a session finds everything else there.
        self.gate = Gate(
            endpoints.session,
            mode=0o666 if self.settings.shared else 0o600,
            sessions=self.sessions,
            host=self,
        )
        self._opened.callback(self.gate.close)
        guard = MemoryGuard([self.control, self.bulk], self._has_session)
        self._opened.callback(guard.close)
        for keeper in self.keepers.values():
            keeper.start()
        for rank in self.ranks:
            rank.start()
        self._ticker = self._loop.call_later(_TICK_SECONDS, self._tick)
        self._opened.callback(lambda: self._ticker.cancel())

    def close(self) -> None:
        """End sessions, children and sockets; nothing remains."""
        self._opened.close()

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(_TICK_SECONDS, self._tick)
        self.gate.drop_late()
        for keeper in self.keepers.values():
            keeper.check()
        self.handle(e.Ticked())

    # --- children

    def _keeper_link(self, device: str) -> KeeperLink:
        def ready(report: k.DeviceReport) -> None:
            most = max(0, report.total - self.settings.reserve)
            budget = most if self.settings.budget is None else min(most, self.settings.budget)
            self.handle(e.KeeperReady(device, budget))

        def lost() -> None:
            self.handle(e.KeeperLost(device))

        return KeeperLink(device, on_ready=ready, on_lost=lost)

    def _rank_link(self, rank: int) -> RankLink:
        devices = self.settings.devices
        gpus = [device for device in devices if device != "cpu"] or devices
        return RankLink(
            rank,
            gpus[rank % len(gpus)],
            arguments=["--runtime-dir", str(self.settings.endpoints.directory)],
            deliver=self.answer,
        )

    def _rank_of(self, session: Session) -> RankLink:
        for rank in self.ranks:
            if rank.pid == session.peer.pid:
                rank.session = session.name
                return rank
        raise Unsupported("only ranks that this daemon started are given tasks")

    # --- sessions

    def welcome(self, session: Session) -> m.Welcome:
        """The answer to a hello."""
        return m.Welcome(
            session=session.name,
            token=session.token,
            boot_id=self.boot_id,
            daemon=__version__,
            devices=list(self.settings.devices),
        )

    def session_ended(self, session: Session) -> None:
        """A stream is gone: its leases end, its requests are forgotten."""
        for request in session.requests:
            self._routes.pop(e.Asker(session.name, request), None)
        self.handle(e.SessionEnded(session.name))

    def _has_session(self, peer: Peer) -> bool:
        return any(session.peer.pid == peer.pid for session in self.sessions.open.values())

    # --- requests

    def _on_control(
        self, router: Router, route: bytes, peer: Peer, frames: list[zmq.Frame]
    ) -> None:
        request_id, asker = 0, None
        try:
            if len(frames) > limits.CONTROL_PARTS:
                raise TooLarge(f"a control message has one frame, this one {len(frames)}")
            request = codec.decode(frames[0].buffer, m.Request, limit=limits.CONTROL_FRAME)
            request_id = request.id
            session = self.sessions.authorize(request.token, peer)
            if not isinstance(request.body, m.CancelRequest):
                # Cancelling must work when no further request is accepted; it is answered at once.
                self.sessions.begin_request(session, request.id)
            elif request.id in session.requests:
                raise BadMessage("a request with this id is open: cancel it under another id")
            asker = e.Asker(session.name, request.id)
            self._routes[asker] = (router, route)
            self._perform(session, asker, request.body)
        except SidecarError as error:
            failed = m.failed_answer(error)
            if asker is not None:
                self.answer(asker, failed)
            else:
                log("request-refused", "warning", uid=peer.uid, pid=peer.pid, code=error.code)
                answer = m.Answer(request_id or _read_id(frames), failed)
                router.send(route, [codec.encode(answer)])
        except Exception:  # noqa: BLE001  one bad request must not end the daemon
            logger.exception("request-broke uid=%d pid=%d", peer.uid, peer.pid)
            if asker is not None:
                self.answer(asker, m.failed_answer(Internal("the daemon failed: see its log")))

    def _perform(self, session: Session, asker: e.Asker, body: m.RequestBody) -> None:
        def key(device: str, fingerprint: str) -> e.Key:
            return e.Key(self.sessions.domain_of(session.peer.uid), fingerprint, device)

        match body:
            case m.Ping():
                self.answer(asker, m.Pong(self.boot_id))
            case m.GetStatus():
                self.answer(asker, build_status(self))
            case m.HandOver(device=device, component=component):
                self.handle(
                    e.HandOverAsked(
                        asker, key(device, component.fingerprint), component, session.peer.uid
                    )
                )
            case m.Attach(device=device, fingerprint=fingerprint):
                self.handle(e.AttachAsked(asker, key(device, fingerprint)))
            case m.Commit(region):
                self.handle(e.CommitAsked(asker, region))
            case m.Abandon(region):
                self.handle(e.AbandonAsked(asker, region))
            case m.Release(lease):
                self.handle(e.ReleaseAsked(asker, lease))
            case m.Evict(device=device, fingerprint=fingerprint):
                self.handle(e.EvictAsked(asker, key(device, fingerprint)))
            case m.CancelRequest(request):
                cancelled = e.Asker(session.name, request)
                self._routes.pop(cancelled, None)
                session.requests.discard(request)
                self.handle(e.RequestCancelled(cancelled))
                self.answer(asker, m.Done())
            case m.Probe():
                probe_region(self, session, asker, body)
            case m.AwaitTask():
                self._rank_of(session).awaits(asker)
            case m.FinishTask():
                self._rank_of(session).finished(body)
                self.answer(asker, m.Done())

    def answer(self, asker: e.Asker, body: m.AnswerBody) -> None:
        """Answer an open request; one whose asker is gone or gave up is forgotten."""
        router, route = self._routes.pop(asker, (None, b""))
        if router is None:
            return
        if (session := self.sessions.open.get(asker.session)) is not None:
            session.requests.discard(asker.request)
        delivered = router.send(route, [codec.encode(m.Answer(asker.request, body))])
        if not delivered and isinstance(body, m.Fill | m.Attached):
            # Later: this may be in the middle of carrying out what the catalog wants.
            self._loop.call_soon(self.handle, e.RequestCancelled(asker))

    def _on_overload(self, router: Router, route: bytes, peer: Peer) -> None:
        # Read by nobody: which request it was is not known. Every asker has a channel to itself.
        failed = m.failed_answer(Busy("too many requests of this process wait: ask more slowly"))
        log("request-refused", "warning", uid=peer.uid, pid=peer.pid, code=failed.code)
        answer = m.BulkAnswer(0, failed) if router is self.bulk else m.Answer(0, failed)
        router.send(route, [codec.encode(answer)])

    def _on_bulk(self, router: Router, route: bytes, peer: Peer, frames: list[zmq.Frame]) -> None:
        request_id = 0
        try:
            if len(frames) > limits.BULK_PARTS or sum(map(len, frames)) > limits.BULK_MESSAGE:
                raise TooLarge("a bulk message has too many or too large frames")
            request = codec.decode(frames[0].buffer, m.BulkRequest, limit=limits.STREAM_FRAME)
            request_id = request.id
            self.sessions.authorize(request.token, peer)
            done = codec.encode(m.BulkAnswer(request.id, m.Done()))
            router.send(route, [done, *frames[1:]])
        except SidecarError as error:
            log("bulk-refused", "warning", uid=peer.uid, pid=peer.pid, code=error.code)
            router.send(route, [codec.encode(m.BulkAnswer(request_id, m.failed_answer(error)))])

    # --- the catalog

    def handle(self, event: e.Event) -> None:
        """Give the catalog an event and carry out what it wants."""
        for instruction in self.catalog.handle(time.monotonic(), event):
            self._carry_out(instruction)

    def _carry_out(self, instruction: e.Instruction) -> None:
        match instruction:
            case e.Allocate(device, region, nbytes):
                ask = k.AllocateRegion(region, nbytes, self.settings.reserve)
                self.ask(device, ask, lambda body: self._allocated(region, body))
            case e.Seal(device, region):
                self.ask(device, k.SealRegion(region), lambda body: self._sealed(region, body))
            case e.Free(device, region):
                self.ask(device, k.FreeRegion(region), lambda _: self.handle(e.RegionFreed(region)))
            case e.GrantFill(asker, device, region, nbytes):
                self._export(asker, device, region, nbytes, lambda grant: m.Fill(grant=grant))
            case e.GrantLease(asker, device, region, nbytes, lease, component):
                self._export(
                    asker,
                    device,
                    region,
                    nbytes,
                    lambda grant: m.Attached(lease=lease, grant=grant, component=component),
                )
            case e.Confirm(asker):
                self.answer(asker, m.Done())
            case e.Refuse(asker, error):
                self.answer(asker, m.failed_answer(error))
            case e.NotifyOrphaned(session, region):
                if (connection := self.gate.connection_of(session)) is not None:
                    connection.send(m.RegionOrphaned(region))
            case e.Note(event, facts, level):
                log(event, level, dict(facts))

    def ask(
        self,
        device: str,
        body: k.KeeperRequestBody,
        then: Callable[[k.KeeperAnswerBody], None],
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask a keeper; ``lost`` if it dies first. What the catalog asked needs no ``lost``:
        KeeperLost deals with it."""

        def answered(future: asyncio.Future[Answer]) -> None:
            if future.cancelled():
                return
            if isinstance(future.exception(), KeeperGone):
                lost()
            else:
                then(future.result()[0])

        self.keepers[device].ask(body).add_done_callback(answered)

    def _allocated(self, region: str, body: k.KeeperAnswerBody) -> None:
        match body:
            case k.DeviceReport():
                self.handle(e.RegionAllocated(region))
            case k.OutOfDeviceMemory(free=free):
                self.handle(e.AllocationRefused(region, free))
            case k.KeeperFailed(code, message):
                self.handle(e.AllocationRefused(region, 0, error_from_code(code, message)))

    def _sealed(self, region: str, body: k.KeeperAnswerBody) -> None:
        if isinstance(body, k.KeeperFailed):
            self.handle(e.SealRefused(region, error_from_code(body.code, body.message)))
        else:
            self.handle(e.RegionSealed(region))

    def _export(
        self,
        asker: e.Asker,
        device: str,
        region: str,
        nbytes: int,
        answer: Callable[[m.RegionGrant], m.AnswerBody],
    ) -> None:
        """Answer with a grant of the region, unless the asker gave up meanwhile."""

        def undelivered(error: SidecarError) -> None:
            self.handle(e.RequestCancelled(asker))
            self.answer(asker, m.failed_answer(error))

        def granted(grant: m.RegionGrant) -> None:
            self.answer(asker, answer(grant))

        self.grant_to(asker.session, device, region, nbytes, granted, undelivered, asker.request)

    def grant_to(
        self,
        session: str,
        device: str,
        region: str,
        nbytes: int,
        granted: Callable[[m.RegionGrant], None],
        failed: Callable[[SidecarError], None],
        request: int = 0,
    ) -> None:
        """Export a region to a session; its descriptor, if it has one, is sent ahead.

        ``request`` is the one that this answers, if any: a client that withdrew it gets nothing.
        """

        def exported(future: asyncio.Future[Answer]) -> None:
            if future.cancelled():
                return
            if future.exception() is not None:
                failed(FillLost(f"the keeper of {device} died: hand over again"))
                return
            body, descriptor = future.result()
            connection = self.gate.connection_of(session)
            if not isinstance(body, k.Exported) or connection is None:
                if descriptor is not None:
                    os.close(descriptor)
                refusal = body if isinstance(body, k.KeeperFailed) else None
                failed(
                    error_from_code(refusal.code, refusal.message)
                    if refusal
                    else DaemonLost("the session ended")
                )
                return
            if request and e.Asker(session, request) not in self._routes:
                if descriptor is not None:
                    os.close(descriptor)
                failed(DaemonLost("the asker gave up"))
                return
            number = None
            if descriptor is not None:
                number = connection.send_descriptor(descriptor, request)
            granted(
                m.RegionGrant(
                    region=region,
                    kind="memfd" if body.handle is None else "cuda_ipc",
                    device=device,
                    nbytes=nbytes,
                    handle=body.handle,
                    descriptor=number,
                )
            )

        self.keepers[device].ask(k.ExportRegion(region)).add_done_callback(exported)


def _read_id(frames: list[zmq.Frame]) -> int:
    try:
        return codec.decode(frames[0].buffer, m.RequestId, limit=limits.CONTROL_FRAME).id
    except SidecarError:
        return 0
