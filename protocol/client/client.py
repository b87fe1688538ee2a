"""The client: hand components over, attach them, ask for status. Blocking and thread-safe."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import zmq

from .. import messages as m
from ..endpoints import client_places, find_daemon
from ..errors import (
    BadMessage,
    DaemonAbsent,
    DaemonLost,
    DeviceUnavailable,
    FillLost,
    InUse,
    SidecarError,
    UnknownComponent,
)
from ..regions.table import process_regions
from .attachment import Attachment
from .deadline import Deadline, ShouldCancel
from .exchange import Exchanges, raise_refusal
from .fill import OpenFill, RegionWriter
from .identity import describe_process
from .progress import FillReports, OnProgress, Progress
from .session import Channel, ClientSession

_log = logging.getLogger("xdit_sidecar.client")

Fill = Callable[[RegionWriter], None]
Body = TypeVar("Body")

# How long a daemon, or a keeper, may take to come back during one hand-over.
_DAEMON_SECONDS = 2.5
_RETRY_SECONDS = 15.0
_RETRY_PAUSE_SECONDS = 0.1
_LetGo = tuple[m.RegionGrant, str, ClientSession]


class Client:
    """Connects when first used, and again after the daemon restarted.

    Every call takes ``timeout`` (seconds) and ``should_cancel``; see :class:`.deadline.Deadline`.
    All errors are :class:`~..errors.SidecarError`; ``retryable`` ones may go away by themselves.
    """

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        name: str = "client",
        host: str | None = None,
        dynamic_vram: bool | None = None,
    ) -> None:
        self._places = client_places(runtime_dir)
        self.endpoints = find_daemon(self._places)
        self._describe: Callable[[], m.Hello] = lambda: describe_process(
            name, host=host, dynamic_vram=dynamic_vram
        )
        self._context: zmq.Context[Channel] = zmq.Context()
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._known = threading.Lock()  # of what is attached and orphaned
        self._orphans: set[str] = set()
        self._session: ClientSession | None = None
        self._closed = False
        self.exchanges = Exchanges()
        self._attachments: weakref.WeakValueDictionary[int, Attachment] = (
            weakref.WeakValueDictionary()
        )
        self._let_go: queue.SimpleQueue[_LetGo | m.Evict | None] = queue.SimpleQueue()
        self._releaser: threading.Thread | None = None

    # --- questions

    def ping(self, *, timeout: float = 5.0, should_cancel: ShouldCancel | None = None) -> str:
        """The daemon's boot id: a new one after every restart."""
        return self._request(m.Ping(), m.Pong, Deadline(timeout, should_cancel)).boot_id

    def status(
        self, *, timeout: float = 5.0, should_cancel: ShouldCancel | None = None
    ) -> m.Status:
        """What is resident, where, how big, shared by whom."""
        return self._request(m.GetStatus(), m.Status, Deadline(timeout, should_cancel))

    def devices(self, *, timeout: float = 5.0) -> list[str]:
        """The devices that the daemon serves: "cpu" or GPU UUIDs."""
        return self.session(Deadline(timeout)).welcome.devices

    @property
    def orphans(self) -> int:
        """How many regions of this client have lost their keeper so far."""
        with self._known:
            return len(self._orphans)

    def evict(self, fingerprint: str, device: str, *, timeout: float = 5.0) -> None:
        """Free an unleased component. Raises InUse or UnknownComponent."""
        evict = m.Evict(device=device, fingerprint=fingerprint)
        self._request(evict, m.Done, Deadline(timeout))

    def evict_soon(self, fingerprint: str, device: str) -> None:
        """Have a component freed after what was released until now; one in use stays.

        Not waited for: for whoever is collected as garbage, as attachments are.
        """
        if not self._closed:
            self._let_go.put(m.Evict(device=device, fingerprint=fingerprint))

    def echo(
        self,
        frames: Sequence[bytes],
        *,
        timeout: float = 10.0,
        should_cancel: ShouldCancel | None = None,
    ) -> list[bytes]:
        """Send raw frames over the bulk socket and get them back."""
        deadline = Deadline(timeout, should_cancel)
        back = self.exchanges.exchange(self.session(deadline), m.Echo(), deadline, frames)[1]
        return [bytes(frame) for frame in back]

    # --- components

    def attach(
        self,
        fingerprint: str,
        device: str,
        *,
        timeout: float = 10.0,
        should_cancel: ShouldCancel | None = None,
    ) -> Attachment | None:
        """The component if it is resident there, otherwise None. Nothing is read or copied."""
        deadline = Deadline(timeout, should_cancel)
        session = self.session(deadline)
        try:
            answer = self.exchanges.ask(
                session, m.Attach(device=device, fingerprint=fingerprint), m.Attached, deadline
            )
        except UnknownComponent:
            return None
        return self._attached(session, answer, deadline)

    def hand_over(
        self,
        component: m.Component,
        device: str,
        fill: Fill,
        *,
        timeout: float = 120.0,
        should_cancel: ShouldCancel | None = None,
        on_progress: OnProgress | None = None,
    ) -> Attachment:
        """Make the component resident, or attach it if someone made it so already.

        ``fill`` is called only if this process is the one to copy the tensors in; it may be called
        again if the daemon or its keeper dies meanwhile. Of several clients that hand over the same
        component at once one fills and the others wait.

        ``timeout`` counts from the last bytes that came, here or at another client that fills.
        ``on_progress`` is told bytes done and in all, about 20 times a second at most, in both
        cases; it starts again with a fill that is lost. What it raises ends the hand-over.
        """
        deadline = Deadline(timeout, should_cancel)
        progress = Progress(component, deadline, on_progress)
        self.session(deadline)  # a daemon that is not there at all is told at once
        failing_since = 0.0
        while True:
            began = time.monotonic()
            try:
                return self._hand_over_once(component, device, fill, deadline, progress)
            except (FillLost, DaemonLost, DaemonAbsent, DeviceUnavailable) as error:
                now = time.monotonic()
                if not failing_since or now - began > _RETRY_SECONDS:
                    failing_since = now  # it had come a good way before it failed
                gone = isinstance(error, DaemonLost | DaemonAbsent)
                patience = _DAEMON_SECONDS if gone else _RETRY_SECONDS
                if now - failing_since > patience or not deadline.remaining:
                    raise
                failed = str(error)
            deadline.next_wait(f"handing over {component.label} ({failed})")
            time.sleep(_RETRY_PAUSE_SECONDS)

    def renew(
        self,
        attachment: Attachment,
        *,
        timeout: float = 120.0,
        should_cancel: ShouldCancel | None = None,
    ) -> Attachment:
        """A new attachment of the same component, after the keeper of the old one died.

        Refilled from this process's mapping unless another client was faster. The caller points
        its parameters at the new tensors and releases the old attachment; when everyone has done
        so there is one copy again.
        """
        return self.copy_to(
            attachment, attachment.device, timeout=timeout, should_cancel=should_cancel
        )

    def copy_to(
        self,
        attachment: Attachment,
        device: str,
        *,
        timeout: float = 120.0,
        should_cancel: ShouldCancel | None = None,
    ) -> Attachment:
        """The component on ``device`` too: attached, or filled from this process's mapping.

        From one GPU to another the bytes do not pass through this process's memory.
        """
        held = attachment.hold()  # stays mapped, whoever releases it meanwhile
        return self.hand_over(
            attachment.component,
            device,
            lambda writer: writer.copy_region(held.mapping),
            timeout=timeout,
            should_cancel=should_cancel,
        )

    def open_fill(
        self,
        component: m.Component,
        device: str,
        *,
        timeout: float = 30.0,
        should_cancel: ShouldCancel | None = None,
    ) -> OpenFill:
        """Begin to fill a component that nobody else has; for callers that do it step by step."""
        deadline = Deadline(timeout, should_cancel)
        session = self.session(deadline)
        hand_over = m.HandOver(device=device, component=component)
        answer, _ = self.exchanges.exchange(session, hand_over, deadline)
        if isinstance(answer, m.Attached):
            self._attached(session, answer, deadline).release()
            raise InUse(f"{component.label} is resident already: attach it")
        if not isinstance(answer, m.Fill):
            raise BadMessage(f"the daemon answered with a {type(answer).__name__}")
        return OpenFill(self.exchanges.ask, session, component, answer.grant, deadline)

    # --- connection

    def session(self, deadline: Deadline) -> ClientSession:
        """The open session, or a new one. Raises DaemonAbsent, NotAllowed, VersionMismatch…"""
        # One connects, the others wait for it, each no longer than it wants to.
        while not self._connecting.acquire(timeout=deadline.next_wait("connecting")):
            pass
        try:
            if self._closed:
                raise DaemonLost("this client is closed")
            if self._session is None or self._session.lost.is_set():
                hello = self._describe()
                self.endpoints = find_daemon(self._places)
                self._session = ClientSession.open(
                    self.endpoints, hello, self._context, deadline, self._orphaned
                )
            return self._session
        finally:
            self._connecting.release()

    def close(self) -> None:
        """End the session and with it its leases, so close a client last.

        What tensors view stays mapped, but the daemon no longer keeps it for them.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            releaser = self._releaser
        if releaser is not None:
            self._let_go.put(None)
            releaser.join()
        with self._connecting:
            session = self._session
        if session is not None:
            session.close()
        # A finalizer may have looked at _closed just before it was set.
        while not self._let_go.empty():
            if isinstance(left := self._let_go.get(), tuple):
                process_regions.release_later(left[0])
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- requests

    def _request(self, body: m.RequestBody, expected: type[Body], deadline: Deadline) -> Body:
        return self.exchanges.ask(self.session(deadline), body, expected, deadline)

    # --- hand-over

    def _hand_over_once(
        self,
        component: m.Component,
        device: str,
        fill: Fill,
        deadline: Deadline,
        progress: Progress,
    ) -> Attachment:
        session = self.session(deadline)
        hand_over = m.HandOver(device=device, component=component, progress=True)
        with self.exchanges.open(session, hand_over, deadline) as request:
            while isinstance(answer := request.receive()[0], m.Filling):
                progress.heard(answer)
        raise_refusal(session, answer)
        if isinstance(answer, m.Attached):
            attachment = self._attached(session, answer, deadline)
            progress.finish()
            return attachment
        if not isinstance(answer, m.Fill):
            raise BadMessage(f"the daemon answered with a {type(answer).__name__}")
        progress.begin()
        ask, grant = self.exchanges.ask, answer.grant
        with (
            FillReports(self.exchanges, session, grant.region) as reports,
            OpenFill(
                ask, session, component, grant, deadline, lambda n: progress.add(n, reports)
            ) as opened,
        ):
            if opened.writer is not None:
                fill(opened.writer)
            reports.close()
            return self._attached(session, opened.commit(), deadline)

    def _attached(
        self, session: ClientSession, answer: m.Attached, deadline: Deadline
    ) -> Attachment:
        grant = answer.grant
        try:
            descriptor = (
                None
                if grant.descriptor is None
                else session.take_descriptor(grant.descriptor, deadline)
            )
            mapping = process_regions.acquire(grant, descriptor)
        except BaseException:
            with contextlib.suppress(SidecarError, zmq.ZMQError):
                self.exchanges.ask(session, m.Release(answer.lease), m.Done, Deadline(1.0))
            raise
        self._start_releaser()
        lease = (grant, answer.lease, session)
        attachment = Attachment(answer.component, grant, mapping, lambda: self._put_down(lease))
        with self._known:
            self._attachments[id(attachment)] = attachment
            if grant.region in self._orphans:
                attachment.orphaned.set()
        return attachment

    def _orphaned(self, region: str) -> None:
        # The notice can overtake the attachment, whose map takes a while on a new device.
        with self._known:
            self._orphans.add(region)
            for attachment in self._attachments.values():
                if attachment.region == region:
                    attachment.orphaned.set()

    # --- giving back

    def _start_releaser(self) -> None:
        with self._lock:
            if self._releaser is None:
                self._releaser = threading.Thread(
                    target=self._release_regions, name="xdit-sidecar-release", daemon=True
                )
                self._releaser.start()

    def _put_down(self, lease: _LetGo) -> None:
        """The last view of an attachment is gone. Runs wherever Python collects garbage."""
        if self._closed:
            process_regions.release_later(lease[0])
        else:
            self._let_go.put(lease)

    def _release_regions(self) -> None:
        while (lease := self._let_go.get()) is not None:
            if isinstance(lease, m.Evict):
                with contextlib.suppress(SidecarError):  # others use it, or it is gone
                    self._request(lease, m.Done, Deadline(5.0))
                continue
            grant, lease_id, session = lease
            try:
                # Unmap first: the daemon may free the region as soon as the lease is gone.
                process_regions.release(grant)
                if not self._closed and not session.lost.is_set():
                    self.exchanges.ask(session, m.Release(lease_id), m.Done, Deadline(5.0))
            except Exception as error:  # noqa: BLE001  the next lease must still be given back
                _log.warning("giving back %s failed: %s", grant.device, error)
