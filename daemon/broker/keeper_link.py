"""The broker's end of a keeper: starts it, asks it, notices its death, starts it again."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Literal

from ...protocol import codec, limits
from ...protocol.errors import SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ..keeper import messages as m
from .child_process import ChildProcess, RestartPolicy
from .log import log

# A keeper only ever makes driver calls; the slowest, a first context, takes seconds on big hosts.
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
_ASK_EVERY_SECONDS = 2.0
_LAST_WORDS_SECONDS = 5.0

Answer = tuple[m.KeeperAnswerBody, int | None]


class KeeperGone(Exception):
    """The keeper died before it answered."""


class KeeperLink:
    """One device's keeper process, over and over.

    ``on_ready(report)`` and ``on_lost()`` alternate. Three failures in a row: the device is held
    ``failed`` with its last error until the daemon is restarted.
    """

    def __init__(
        self,
        device: str,
        *,
        on_ready: Callable[[m.DeviceReport], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.device = device
        self.state: Literal["starting", "ready", "failed"] = "starting"
        self.error: str | None = None
        self.report: m.DeviceReport | None = None
        self.starts = 0
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._child: ChildProcess | None = None
        self._stream: FrameStream | None = None
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._next_id = 1
        self._policy = RestartPolicy()
        self._heard = 0.0  # when it last answered, or was started
        self._asked = 0.0  # when the oldest unanswered request was sent
        self._restart: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the process; its first frame will tell that it is ready."""
        self._restart = None
        self._policy.started()
        self._heard = time.monotonic()
        self.starts += 1
        self.state = "starting"
        try:
            self._open()
        except OSError as error:  # no descriptors, processes or memory left
            self._hang_up()
            if self._child is not None:
                self._child.discard()
                self._child = None
            self.error = f"the keeper process could not be started: {error}"
            log("keeper-not-started", "error", device=self.device, error=self.error)
            self._start_again()
        else:
            log("keeper-started", device=self.device, pid=self.pid)

    def _open(self) -> None:
        ours, theirs = socket.socketpair()
        self._stream = FrameStream(ours, backlog=m.BACKLOG)
        with theirs:
            self._child = ChildProcess(
                "xdit_sidecar.daemon.keeper",
                ["--device", self.device, "--channel", str(theirs.fileno())],
                on_exit=self._exited,
                descriptors=[theirs.fileno()],
            )
        self._loop.add_reader(ours, self._readable)

    def ask(self, body: m.KeeperRequestBody) -> asyncio.Future[Answer]:
        """Queue a request at once. The answer's descriptor, if any, is the caller's.

        The future raises KeeperGone when the keeper dies first.
        """
        future: asyncio.Future[Answer] = self._loop.create_future()
        if self._stream is None or self.state != "ready":
            future.set_exception(KeeperGone())
            return future
        if not self._pending:
            self._asked = time.monotonic()
        request_id = self._next_id
        self._next_id += 1
        try:
            self._stream.queue_frame(codec.encode(m.KeeperRequest(request_id, body)))
        except StreamClosed as error:
            # Later: the catalog may be in the midst of an event, and losing a keeper is another.
            self._loop.call_soon(self._overflowed, self._stream, str(error))
            future.set_exception(KeeperGone())
            return future
        self._pending[request_id] = future
        self._flush()
        return future

    def check(self) -> None:
        """Call about once a second: keeps the report fresh and ends a keeper that hangs."""
        now = time.monotonic()
        if self._child is None:
            return
        if self.state == "starting" and now - self._heard > _START_SECONDS:
            self._give_up(f"it did not start within {_START_SECONDS:.0f} s")
        elif self._pending and now - max(self._asked, self._heard) > _ANSWER_SECONDS:
            self._give_up(f"it did not answer for {_ANSWER_SECONDS:.0f} s")
        elif not self._pending and now - self._heard > _ASK_EVERY_SECONDS:
            self.ask(m.DescribeDevice()).add_done_callback(_ignore)

    def close(self) -> None:
        """End the process and do not start it again."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
        self._hang_up()
        if self._child is not None:
            self._child.discard()
            self._child = None

    # --- the channel

    def _readable(self) -> None:
        try:
            if self._stream is not None:
                self._stream.read_available()
            while self._stream is not None and (frame := self._stream.take_frame()) is not None:
                self._answered(codec.decode(frame, m.KeeperAnswer, limit=limits.STREAM_FRAME))
        except StreamClosed:
            self._give_up(None)
        except SidecarError as error:
            self._give_up(f"it answered nonsense: {error}")

    def _flush(self) -> None:
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except StreamClosed:
            return  # the reader will notice
        if self._stream.has_unsent:
            self._loop.add_writer(self._stream, self._flush)
        else:
            self._loop.remove_writer(self._stream)

    def _answered(self, answer: m.KeeperAnswer) -> None:
        self._heard = time.monotonic()
        descriptor = None
        if isinstance(answer.body, m.Exported) and answer.body.has_descriptor and self._stream:
            descriptor = self._stream.take_descriptor()
        if isinstance(answer.body, m.DeviceReport):
            self.report = answer.body
        if answer.id == 0:
            self._introduced(answer.body)
            return
        future = self._pending.pop(answer.id, None)
        if future is not None and not future.done():
            future.set_result((answer.body, descriptor))
        elif descriptor is not None:
            os.close(descriptor)

    def _introduced(self, body: m.KeeperAnswerBody) -> None:
        if isinstance(body, m.DeviceReport):
            self.state, self.error = "ready", None
            log("keeper-ready", device=self.device, pid=self.pid, bytes=body.total)
            self._on_ready(body)
        elif isinstance(body, m.KeeperFailed):
            self.error = body.message

    # --- death

    def _overflowed(self, stream: FrameStream, reason: str) -> None:
        if self._stream is stream:
            self._give_up(reason)

    def _give_up(self, reason: str | None) -> None:
        """Hang up and make sure that it ends; :meth:`_exited` goes on from there."""
        was_ready = self.state == "ready"
        if reason is not None:
            self.error = f"the keeper process {self.pid} was ended: {reason}"
        self.state = "starting"
        self._hang_up()
        if self._child is not None:
            # One that closed the channel itself is about to end and may have a reason to tell.
            grace = _LAST_WORDS_SECONDS if reason is None else 0.0
            self._loop.call_later(grace, self._child.kill)
        if was_ready:
            self._on_lost()

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._loop.remove_reader(self._stream)
            self._loop.remove_writer(self._stream)
            self._stream.close()
            self._stream = None
        self.report = None
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(KeeperGone())

    def _exited(self, status: int) -> None:
        pid = self.pid
        self._readable()  # its last words may still be there
        self._child = None
        if self._stream is not None:
            self._give_up(None)
        self.error = self.error or f"the keeper process {pid} ended with status {status}"
        log("keeper-lost", "error", device=self.device, pid=pid, status=status, error=self.error)
        self._start_again()

    def _start_again(self) -> None:
        delay = self._policy.failed()
        if delay is None:
            self.state = "failed"
            log("device-failed", "error", device=self.device, error=self.error)
        else:
            self._restart = self._loop.call_later(delay, self.start)


def _ignore(future: asyncio.Future[Answer]) -> None:
    if not future.cancelled():
        future.exception()
