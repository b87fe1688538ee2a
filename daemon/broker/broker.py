"""The broker: messages in, catalog and sessions asked, instructions carried out."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from ... import __version__
from ...protocol import codec, limits
from ...protocol import messages as m
from ...protocol.errors import (
    BadMessage,
    Busy,
    Internal,
    RankLost,
    SidecarError,
    TooLarge,
    Unsupported,
    error_from_code,
)
from ...protocol.peers import Peer
from ..keeper import messages as k
from ..settings import Settings
from . import events as e
from .admission import name_holders
from .catalog import Catalog
from .copy import Copy
from .device_orders import DeviceOrders
from .doorman import Doorman
from .gate import Gate
from .grants import Grants
from .job_service import Frames, JobService
from .keeper_link import Answer, KeeperGone, KeeperLink
from .log import log, logger
from .memory_guard import MemoryGuard
from .probes import probe_region
from .rank_group import RankGroup
from .report import build_status
from .router import Router
from .sessions import Session, Sessions
from .tally import Tally

_TICK_SECONDS = 1.0
_ROOM_SECONDS = 10.0
_LOOK_SECONDS = 0.01


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
        self.group = self._rank_group()
        self.service = JobService(self, self.group)
        self.tally = Tally()
        self._orders = DeviceOrders()
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
        endpoints = self.settings.endpoints
        self._doorman = Doorman(self._zmq, self._has_session)
        self._opened.callback(self._doorman.close)
        self.control = self._router(
            endpoints.control, limits.CONTROL_FRAME, limits.CONTROL_PARTS, limits.CONTROL_QUEUE
        )
        self.bulk = self._router(
            endpoints.bulk, limits.BULK_FRAME, limits.BULK_PARTS, limits.BULK_QUEUE
        )
        for keeper in self.keepers.values():
            self._opened.callback(keeper.close)
        self._opened.callback(self.group.close)
        self._opened.callback(self.service.close)
        # Last: who can open a session finds everything else there.
        self.gate = Gate(
            endpoints.session,
            mode=0o666 if self.settings.shared else 0o600,
            sessions=self.sessions,
            host=self,
        )
        self._opened.callback(self.gate.close)
        self.grants = Grants(self.keepers, self.gate)
        guard = MemoryGuard(
            [self.control, self.bulk], self._has_session, lambda: self.service.held_bytes
        )
        self._opened.callback(guard.close)
        for keeper in self.keepers.values():
            keeper.start()
        if self.group.devices:
            self.group.start()
        self.service.start()
        self._ticker = self._loop.call_later(_TICK_SECONDS, self._tick)
        self._opened.callback(lambda: self._ticker.cancel())

    def reconfigure(self, settings: Settings) -> None:
        """Use another budget, reserve and idle time from now on; ranks from their next start on."""
        self.settings = settings
        self.catalog.idle_seconds = settings.idle_seconds
        self.group.reserve = settings.reserve
        for device, keeper in self.keepers.items():
            if keeper.state == "ready" and keeper.report is not None:
                self.handle(e.KeeperReady(device, self._budget(keeper.report)))

    def status(self) -> m.Status:
        """The state of everything, now."""
        return build_status(self)

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
            self.handle(e.KeeperReady(device, self._budget(report)))

        def lost() -> None:
            self._orders.forget(device)  # before the catalog gives new ones
            self.handle(e.KeeperLost(device))

        return KeeperLink(device, on_ready=ready, on_lost=lost)

    def _budget(self, report: k.DeviceReport) -> int:
        most = max(0, report.total - self.settings.reserve)
        return most if self.settings.budget is None else min(most, self.settings.budget)

    def _rank_group(self) -> RankGroup:
        settings = self.settings
        gpus = [device for device in settings.devices if device != "cpu"] or settings.devices

        def lost(error: RankLost) -> None:
            self.service.ranks_lost(error)

        return RankGroup(
            [gpus[rank % len(gpus)] for rank in range(settings.ranks)],
            settings.endpoints.directory,
            deadline=settings.deadline,
            reserve=settings.reserve,
            compiles=settings.compiles,
            deliver=self.answer,
            on_lost=lost,
            on_change=lambda: self.service.ranks_changed(),
        )

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
            self._forget(e.Asker(session.name, request))
        self.service.session_ended(session.name)
        self.handle(e.SessionEnded(session.name))

    def _has_session(self, peer: Peer) -> bool:
        return any(session.peer.pid == peer.pid for session in self.sessions.open.values())

    # --- requests

    def _router(self, path: Path, frame_limit: int, part_limit: int, queue: int) -> Router:
        router = Router(
            self._zmq,
            path,
            allowed=self.settings.allowed_uids,
            shared=self.settings.shared,
            frame_limit=frame_limit,
            part_limit=part_limit,
            queue=queue,
            on_message=self._on_message,
            on_overload=self._on_overload,
            doorman=self._doorman,
        )
        self._opened.callback(router.close)
        return router

    def _on_message(
        self, router: Router, route: bytes, peer: Peer, frames: list[zmq.Frame]
    ) -> None:
        request_id, asker = 0, None
        try:
            request = self._read(router, frames)
            request_id = request.id
            session = self.sessions.authorize(request.token, peer)
            if not isinstance(request.body, m.CancelRequest):
                # Cancelling must work when no further request is accepted; it is answered at once.
                self.sessions.begin_request(session, request.id)
            elif request.id in session.requests:
                raise BadMessage("a request with this id is open: cancel it under another id")
            asker = e.Asker(session.name, request.id)
            self._routes[asker] = (router, route)
            self.tally.begin(asker, request.body, peer.pid)
            self._perform(session, asker, request.body, frames[1:])
        except SidecarError as error:
            failed = m.failed_answer(error)
            if asker is not None:
                self.answer(asker, failed)
            else:
                facts = {"uid": peer.uid, "pid": peer.pid, "request": request_id}
                log("request-refused", "warning", facts, code=error.code)
                answer = m.Answer(request_id or _read_id(frames), failed)
                router.send(route, [codec.encode(answer)])
        except Exception:  # noqa: BLE001  one bad request must not end the daemon
            logger.exception(
                "request-broke uid=%d pid=%d request=%d", peer.uid, peer.pid, request_id
            )
            if asker is not None:
                self.answer(asker, m.failed_answer(Internal("the daemon failed: see its log")))

    def _read(self, router: Router, frames: list[zmq.Frame]) -> m.Request | m.BulkRequest:
        """The header of a message. Raises BadMessage and TooLarge."""
        if router is self.control:
            if len(frames) > limits.CONTROL_PARTS:
                raise TooLarge(f"a control message has one frame, this one {len(frames)}")
            return codec.decode(frames[0].buffer, m.Request, limit=limits.CONTROL_FRAME)
        if len(frames) > limits.BULK_PARTS or sum(map(len, frames)) > limits.BULK_MESSAGE:
            raise TooLarge("a bulk message has too many or too large frames")
        return codec.decode(frames[0].buffer, m.BulkRequest, limit=limits.STREAM_FRAME)

    def _perform(
        self,
        session: Session,
        asker: e.Asker,
        body: m.RequestBody | m.BulkBody,
        frames: list[zmq.Frame],
    ) -> None:
        domain = self.sessions.domain_of(session.peer.uid)

        def key(device: str, fingerprint: str) -> e.Key:
            return e.Key(domain, fingerprint, device)

        match body:
            case m.Ping():
                self.answer(asker, m.Pong(self.boot_id))
            case m.GetStatus():
                self.answer(asker, self.status())
            case m.HandOver(device=device, component=component, progress=progress):
                self.handle(
                    e.HandOverAsked(
                        asker,
                        key(device, component.fingerprint),
                        component,
                        session.peer.uid,
                        progress,
                    )
                )
            case m.Attach(device=device, fingerprint=fingerprint):
                self.handle(e.AttachAsked(asker, key(device, fingerprint)))
            case m.FillProgress(region, nbytes):
                self.handle(e.FillProgressed(asker, region, nbytes))
            case m.Commit(region):
                self.handle(e.CommitAsked(asker, region))
            case m.Abandon(region):
                self.handle(e.AbandonAsked(asker, region))
            case m.Release(lease):
                self.handle(e.ReleaseAsked(asker, lease))
            case m.Evict(device=device, fingerprint=fingerprint):
                self.handle(e.EvictAsked(asker, key(device, fingerprint)))
            case m.OpenScratch():
                file = self.service.open_scratch(session.name, body)
                number = self.send_descriptor(session.name, file, asker.request)
                self.answer(asker, m.ScratchOpened(number))
            case m.CancelRequest(request):
                cancelled = e.Asker(session.name, request)
                self._forget(cancelled)
                session.requests.discard(request)
                self.service.cancel(cancelled)
                self.handle(e.RequestCancelled(cancelled))
                self.answer(asker, m.Done())
            case m.Probe():
                probe_region(self, session, asker, body)
            case m.Echo():
                self.answer(asker, m.Done(), frames)
            case m.NextTask():
                if (rank := self.group.rank_of(session.peer.pid)) is None:
                    raise Unsupported("only ranks that this daemon started are given tasks")
                rank.asks(asker, body, frames)
            case m.Forward() | m.Generate() | m.Decode() | m.Encode() | m.EncodeText():
                self.service.submit(asker, domain, body, frames)

    def answer(self, asker: e.Asker, body: m.AnswerBody, frames: Frames = ()) -> None:
        """Answer an open request; one whose asker is gone or gave up is forgotten."""
        router, route = self._routes.pop(asker, (None, b""))
        if router is None:
            return
        self.tally.answered(asker, body)
        if (session := self.sessions.open.get(asker.session)) is not None:
            session.requests.discard(asker.request)
        delivered = router.send(route, [codec.encode(m.Answer(asker.request, body)), *frames])
        if not delivered and isinstance(body, m.Fill | m.Attached):
            # Later: this may be in the middle of carrying out what the catalog wants.
            self._loop.call_soon(self.handle, e.RequestCancelled(asker))

    def _forget(self, asker: e.Asker) -> None:
        """Nobody waits for this answer any more."""
        self._routes.pop(asker, None)
        self.tally.given_up(asker)

    def answer_step(self, asker: e.Asker, body: m.Step | m.Filling, frames: Frames = ()) -> None:
        """Tell an asker how far it is; the answer follows."""
        router, route = self._routes.get(asker, (None, b""))
        if router is not None:
            router.send(route, [codec.encode(m.Answer(asker.request, body)), *frames])

    def _on_overload(self, router: Router, route: bytes, peer: Peer) -> None:
        # Read by nobody: which request it was is not known. Every asker has a channel to itself.
        failed = m.failed_answer(Busy("too many requests of this process wait: ask more slowly"))
        log("request-refused", "warning", uid=peer.uid, pid=peer.pid, code=failed.code)
        router.send(route, [codec.encode(m.Answer(0, failed))])

    # --- the catalog

    def handle(self, event: e.Event) -> None:
        """Give the catalog an event and carry out what it wants."""
        for instruction in self.catalog.handle(time.monotonic(), event):
            self._carry_out(instruction)

    def _carry_out(self, instruction: e.Instruction) -> None:
        match instruction:
            case e.Allocate(device, region, nbytes):
                ask = k.AllocateRegion(region, nbytes, self.settings.reserve)
                self._orders.give(
                    device,
                    lambda: self.ask(device, ask, lambda body: self._allocated(region, body)),
                )
            case e.Seal(device, region):
                self.ask(device, k.SealRegion(region), lambda body: self._sealed(region, body))
            case e.Free(device, region):
                self._orders.give(device, lambda: self._free(device, region))
            case e.Unmap(region):
                self.service.close_region(region, lambda: None)
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
            case e.TellProgress(asker, filled, nbytes):
                self.answer_step(asker, m.Filling(filled=filled, nbytes=nbytes))
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

    def _free(self, device: str, region: str) -> None:
        def free() -> None:
            self.ask(device, k.FreeRegion(region), lambda _: self.handle(e.RegionFreed(region)))

        def unmapped() -> None:
            free()
            self._orders.release(device)

        # Ranks first: memory that is still mapped does not come back.
        if self.service.close_region(region, unmapped):
            self._orders.hold(device)
        else:
            free()

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

    # --- what the job service needs

    def find_resident(self, domain: str, fingerprint: str, device: str) -> Copy | None:
        """The copy that jobs of this domain may use."""
        return self.catalog.use(time.monotonic(), e.Key(domain, fingerprint, device))

    async def export_to(self, session: str, copy: Copy) -> m.RegionGrant:
        """A grant of the copy's region for a rank. Raises SidecarError."""
        return await self.grants.obtain(session, copy.key.device, copy.region, copy.nbytes)

    def send_descriptor(self, session: str, descriptor: int, request: int = 0) -> int:
        """See :meth:`.grants.Grants.send`."""
        return self.grants.send(session, descriptor, request)

    async def make_room(self, device: str, keep: frozenset[str]) -> None:
        """Evict what nobody leases from a device, but for some regions; returns when it is gone."""
        self.handle(e.RoomWanted(device, keep))
        until = time.monotonic() + _ROOM_SECONDS
        while self.catalog.is_freeing(device) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_SECONDS)

    def name_holders(self, device: str) -> str:
        """Who keeps what on a device from being evicted; "" if nobody does."""
        return name_holders(device, self.catalog.copies.values())

    # --- grants

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

        self.grants.give(
            asker.session,
            device,
            region,
            nbytes,
            lambda grant: self.answer(asker, answer(grant)),
            undelivered,
            request=asker.request,
            wanted=lambda: asker in self._routes,
        )


def _read_id(frames: list[zmq.Frame]) -> int:
    try:
        return codec.decode(frames[0].buffer, m.RequestId, limit=limits.CONTROL_FRAME).id
    except SidecarError:
        return 0
