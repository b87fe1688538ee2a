"""What an attack is, and what it aims at."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgpack
import zmq
from xdit_sidecar.protocol.endpoints import Endpoints, zmq_address

from hostile.wire import RawSession

ANSWER_SECONDS = 20.0
# What the daemon does to us when it defends itself.
DEFENDED = (OSError, EOFError)


@dataclass
class Target:
    """A daemon and the attacker's seeded chance. ``secrets`` must not show up in its log."""

    endpoints: Endpoints
    random: random.Random
    secrets: list[bytes] = field(default_factory=list)

    @contextmanager
    def session(self) -> Iterator[RawSession]:
        """An open session of this process; waits its turn when the daemon is busy."""
        for _ in range(100):
            try:
                session = RawSession(self.endpoints.session)
                break
            except DEFENDED:
                time.sleep(0.05)
        else:
            raise AssertionError("no session was to be had")
        self.secrets.append(session.token)
        with session:
            yield session


class Dealer:
    """A ZeroMQ channel that sends anything."""

    def __init__(self, target: Target, *, bulk: bool = False, identity: bytes = b"") -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndtimeo = self.socket.rcvtimeo = int(ANSWER_SECONDS * 1000)
        if identity:
            self.socket.routing_id = identity
        path = target.endpoints.bulk if bulk else target.endpoints.control
        self.socket.connect(zmq_address(path))

    def receive(self) -> dict[str, object]:
        """The next answer's body. zmq.Again when none comes."""
        return msgpack.unpackb(self.socket.recv_multipart()[0])["body"]

    def ask(self, token: bytes, body: dict[str, object], request: int = 1) -> dict[str, object]:
        """One request and its answer's body."""
        self.socket.send(msgpack.packb({"token": token, "id": request, "body": body}))
        return self.receive()

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        self._context.term()


class Attack(ABC):
    """``count`` inputs are sent in the soak, a fiftieth of them (``few``) in a test."""

    name: str
    count: int
    #: Whether unread data may take the daemon to limits.UNREAD_MEMORY.
    fills_memory = False
    #: Words of a log line that must be there afterwards, with the attacker's uid and pid.
    logged: str | None = None

    @property
    def few(self) -> int:
        """The number of inputs in a test."""
        return max(1, self.count // 50)

    @abstractmethod
    def run(self, target: Target, count: int) -> int:
        """Attack. Returns how many inputs were sent; AssertionError if one got its way."""


def expect_refusal(answer: dict[str, object], *codes: str) -> None:
    """The answer must be a typed error, one of ``codes`` if any are given."""
    assert answer["type"] == "failed", f"got its way: {answer['type']}"
    assert not codes or answer["code"] in codes, f"refused with {answer['code']}, not {codes}"
