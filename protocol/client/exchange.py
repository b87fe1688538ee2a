"""One request and its answers, on a channel of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar, get_args

import zmq

from .. import codec, limits
from .. import messages as m
from ..errors import BadMessage, TooLarge, Unauthorized, error_from_code
from .deadline import Deadline
from .session import Channel, ClientSession

Body = TypeVar("Body")
Frames = Sequence[bytes | memoryview]

_BULK = tuple(kind for kind in get_args(m.BulkBody) if kind is not m.CancelRequest)
_CANCEL_LINGER_MS = 200


class OpenRequest:
    """A request that was sent; its answers are received in order, usually one."""

    def __init__(
        self, channel: Channel, session: ClientSession, request: int, deadline: Deadline
    ) -> None:
        self._channel = channel
        self._session = session
        self._id = request
        self._deadline = deadline

    def is_answered(self) -> bool:
        """Whether :meth:`receive` would not have to wait."""
        return bool(self._channel.poll(0))

    def receive(self) -> tuple[m.AnswerBody, list[memoryview]]:
        """The next answer and its raw frames; a refusal is returned like any other answer.

        The frames show ZeroMQ's own memory: to copy a latent costs as much as to send it.

        Raises Cancelled, DeadlineExceeded, DaemonLost and BadMessage.
        """
        waiting = "waiting for the daemon"
        while not self._channel.poll(max(1, int(self._deadline.next_wait(waiting) * 1000))):
            if self._session.lost.is_set():
                raise self._session.why_lost
        header, *frames = self._channel.recv_multipart(copy=False)
        answer = codec.decode(header.bytes, m.Answer, limit=limits.CONTROL_FRAME)
        if answer.id != self._id:
            raise BadMessage("the daemon answered another request")
        return answer.body, [frame.buffer for frame in frames]


class Exchanges:
    """The requests of one client, whose ids count up. Thread-safe."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)

    @contextlib.contextmanager
    def open(
        self,
        session: ClientSession,
        body: m.RequestBody | m.BulkBody,
        deadline: Deadline,
        frames: Frames = (),
    ) -> Iterator[OpenRequest]:
        """Send a request. Whatever ends the block early withdraws it."""
        request = next(self._ids)
        bulk = isinstance(body, _BULK)
        with (session.bulk if bulk else session.control).channel() as channel:
            _send(channel, session, request, body, frames, bulk=bulk)
            try:
                yield OpenRequest(channel, session, request, deadline)
            except BaseException:
                self._withdraw(session, channel, request, bulk=bulk)
                raise

    def ask(
        self,
        session: ClientSession,
        body: m.RequestBody | m.BulkBody,
        expected: type[Body],
        deadline: Deadline,
    ) -> Body:
        """The answer, of the expected type; refusals are raised."""
        answer = self.exchange(session, body, deadline)[0]
        if not isinstance(answer, expected):
            raise BadMessage(f"the daemon answered with a {type(answer).__name__}")
        return answer

    def exchange(
        self,
        session: ClientSession,
        body: m.RequestBody | m.BulkBody,
        deadline: Deadline,
        frames: Frames = (),
    ) -> tuple[m.AnswerBody, list[memoryview]]:
        """One request, its answer and the answer's raw frames; refusals are raised."""
        with self.open(session, body, deadline, frames) as request:
            answer, back = request.receive()
        raise_refusal(session, answer)
        return answer, back

    def _withdraw(
        self, session: ClientSession, channel: Channel, request: int, *, bulk: bool
    ) -> None:
        """Whatever stopped the wait: the daemon must not answer it later with a lease.

        Not waited for: who gave up waits no longer. On the same channel, so that it cannot arrive
        before what it withdraws.
        """
        session.forget_request(request)
        with contextlib.suppress(zmq.ZMQError):
            body = m.CancelRequest(request)
            _send(channel, session, next(self._ids), body, (), bulk=bulk, flags=zmq.NOBLOCK)
            channel.linger = _CANCEL_LINGER_MS


def raise_refusal(session: ClientSession, answer: m.AnswerBody) -> None:
    """Raise what a refusal says; do nothing for any other answer."""
    if not isinstance(answer, m.Failed):
        return
    if answer.code == Unauthorized.code and session.lost.wait(1.0):
        raise session.why_lost
    # Not through a local variable: error, traceback and frame would be a cycle that keeps the
    # callers' tensors, and so their regions, until garbage is collected.
    raise error_from_code(answer.code, answer.message)


def _send(
    channel: Channel,
    session: ClientSession,
    request: int,
    body: m.RequestBody | m.BulkBody,
    frames: Frames,
    *,
    bulk: bool,
    flags: int = 0,
) -> None:
    kind = m.BulkRequest if bulk else m.Request
    header = codec.encode(kind(session.welcome.token, request, body))  # type: ignore[arg-type]
    if bulk:
        _check_bulk(len(header), frames)
    # Copied: pyzmq sends large buffers uncopied only with a thread of its own, for good.
    channel.send_multipart([header, *frames], flags)


def _check_bulk(header: int, frames: Frames) -> None:
    """Raise TooLarge for what the daemon would drop, connection and all, without an answer."""
    sizes = [header, *(memoryview(frame).nbytes for frame in frames)]
    if len(sizes) > limits.BULK_PARTS:
        raise TooLarge(f"{len(frames)} frames at once; the most is {limits.BULK_PARTS - 1}")
    if max(sizes) > limits.BULK_FRAME or sum(sizes) > limits.BULK_MESSAGE:
        raise TooLarge(
            f"a tensor of {max(sizes)} bytes, {sum(sizes)} in all; the most at once is "
            f"{limits.BULK_FRAME} and {limits.BULK_MESSAGE}: send a smaller batch or picture"
        )
