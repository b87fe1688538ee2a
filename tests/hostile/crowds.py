"""Connections: too many, too slow, with chosen names, with descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
import time
from collections.abc import Callable

from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.version import encode_preamble

from hostile.attack import DEFENDED, Attack, Dealer, Target, expect_refusal
from hostile.wire import GREETING, connect, frame, hello, raw_zmq, zmtp_frame, zmtp_ready


def foretell_routing_ids(sockets: int, peers: int) -> list[bytes]:
    """What libzmq calls the first peers of the first ROUTERs where nobody seeded C's rand()."""
    libc = ctypes.CDLL(None)
    libc.srandom(1)
    found = []
    for _ in range(sockets):
        low, high = libc.rand(), libc.rand()
        first = (low | high << 31) % 2**32
        found += [b"\0" + struct.pack("!I", (first + n) % 2**32) for n in range(peers)]
    return found


def allow_descriptors() -> None:
    """As many as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class IdleConnections(Attack):
    """Thousands of connections to all sockets that say nothing, or half a greeting."""

    name = "idle-connections"
    count = 10_000

    @property
    def few(self) -> int:
        return 400

    def run(self, target: Target, count: int) -> int:
        allow_descriptors()
        with contextlib.ExitStack() as held:
            for number in range(count):
                path = target.endpoints.sockets[number % 3]
                with contextlib.suppress(*DEFENDED):
                    sock = held.enter_context(connect(path))
                    if number % 2 and path != target.endpoints.session:
                        sock.sendall(GREETING)
            time.sleep(1.0)
        return count


class GreetedConnections(Attack):
    """ZeroMQ connections that complete their handshake, from a process with a session."""

    name = "greeted-connections"
    count = 5_000

    def run(self, target: Target, count: int) -> int:
        allow_descriptors()
        with target.session(), contextlib.ExitStack() as held:
            for number in range(count):
                with contextlib.suppress(*DEFENDED):
                    sock = held.enter_context(connect(target.endpoints.sockets[1 + number % 2]))
                    sock.sendall(GREETING + zmtp_ready() + zmtp_frame(b"x"))
        return count


class SessionChurn(Attack):
    """Sessions opened and ended as fast as it goes."""

    name = "session-churn"
    count = 5_000

    def run(self, target: Target, count: int) -> int:
        for _ in range(count):
            with contextlib.suppress(*DEFENDED), connect(target.endpoints.session) as sock:
                sock.sendall(encode_preamble() + frame(hello()))
                if target.random.random() < 0.5:
                    sock.recv(4096)
        return count


class RoutingIds(Attack):
    """Names that the client chooses: doubles, empty, long, and those that libzmq gives next."""

    name = "routing-ids"
    count = 2_000

    @property
    def few(self) -> int:
        return 200

    def run(self, target: Target, count: int) -> int:
        guesses = foretell_routing_ids(sockets=4, peers=16)
        with target.session() as session, contextlib.ExitStack() as held:
            for number in range(count):
                guess = guesses[number % len(guesses)]
                name = target.random.choice(
                    (b"same", b"", b"n" * 255, b"n" * 4096, b"\0", guess, os.urandom(5))
                )
                path = target.endpoints.sockets[1 + number % 2]
                with contextlib.suppress(*DEFENDED):
                    held.enter_context(raw_zmq(path, name))
                if number % 64 == 63:
                    held.close()
                if number % 32 == 0:
                    with Dealer(target, identity=b"me%d" % number) as dealer:
                        answer = dealer.ask(session.token, {"type": "ping"})
                        assert answer["type"] == "pong", "a named channel was not served"
        return count


class SentDescriptors(Attack):
    """File descriptors that nobody asked for, to every socket."""

    name = "sent-descriptors"
    count = 5_000

    def run(self, target: Target, count: int) -> int:
        with open(os.devnull, "rb") as file:
            for number in range(count):
                amount = target.random.choice((1, 3, 8, 9, 64, 253))
                start = (encode_preamble() + frame(hello()), encode_preamble(), b"\0")[number % 3]
                path = target.endpoints.sockets[number % 4 % 3]
                with contextlib.suppress(*DEFENDED), connect(path) as sock:
                    if path != target.endpoints.session:
                        start = GREETING
                    socket.send_fds(sock, [start], [file.fileno()] * amount)
                    socket.send_fds(sock, [b"\0"], [file.fileno()] * amount)
        return count


class Scratches(Attack):
    """Scratch regions of any number and size, instead of any others, and none given up."""

    name = "scratches"
    count = 5_000

    def run(self, target: Target, count: int) -> int:
        numbers, opened = range(2 * limits.SCRATCHES_PER_SESSION), 0
        with target.session() as session, Dealer(target) as dealer:
            for request in range(1, count + 1):
                number, other = target.random.choices((*numbers, -1, 2**60), k=2)
                size = target.random.choice((0, 1, 4095, 4096, limits.SCRATCH, limits.SCRATCH + 1))
                body = {"type": "open-scratch", "number": number, "nbytes": size}
                if target.random.random() < 0.5:
                    body["instead_of"] = other
                answer = dealer.ask(session.token, body, request)
                if answer["type"] == "scratch-opened":
                    opened += 1
                else:
                    expect_refusal(answer, "bad-message", "busy", "out-of-memory")
                session.drain()
        assert opened
        return count


class SlowHello(Attack):
    """Hellos a byte at a time: dropped when their time is over, without harm to others."""

    name = "slow-hello"
    count = 2_000
    logged = "session-refused"

    def run(self, target: Target, count: int) -> int:
        said = encode_preamble() + frame(hello(name="slow" * 20))
        sent = 0
        while sent < count:
            batch = min(limits.UNGREETED_SESSIONS // 2, count - sent)
            with contextlib.ExitStack() as held:
                socks = [
                    held.enter_context(connect(target.endpoints.session)) for _ in range(batch)
                ]
                cut = self._dribble(socks, said, limits.HELLO_SECONDS + 3.0)
            assert cut == batch, f"{batch - cut} of {batch} slow hellos were not dropped"
            sent += batch
            if sent >= 128:
                # The rest without waiting: newcomers push them out.
                sent += self._crowd(target, count - sent, lambda: said[:9])
        return sent

    def _dribble(self, socks: list[socket.socket], said: bytes, seconds: float) -> int:
        end = time.monotonic() + seconds
        alive = list(socks)
        for at in range(len(said) - 1):
            if not alive or time.monotonic() > end:
                break
            for sock in list(alive):
                try:
                    sock.sendall(said[at : at + 1])
                except OSError:
                    alive.remove(sock)
            time.sleep(0.1)
        return len(socks) - len(alive)

    def _crowd(self, target: Target, count: int, start: Callable[[], bytes]) -> int:
        with contextlib.ExitStack() as held:
            for number in range(max(0, count)):
                with contextlib.suppress(*DEFENDED):
                    held.enter_context(connect(target.endpoints.session)).sendall(start())
                if number % 500 == 499:
                    held.close()
        return max(0, count)
