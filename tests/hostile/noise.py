"""Bytes that mean nothing, and messages that nearly mean something."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

import msgpack
import zmq
from xdit_sidecar.protocol.version import encode_preamble

from hostile.attack import DEFENDED, Attack, Dealer, Target, expect_refusal
from hostile.wire import GREETING, connect, frame, hello, raw_zmq, zmtp_frame

_PER_CONNECTION = 50


class RandomBytes(Attack):
    """Random bytes to all sockets, at every stage of their handshakes."""

    name = "random-bytes"
    count = 40_000

    def run(self, target: Target, count: int) -> int:
        sent = 0
        with target.session():  # so that ZeroMQ connections of this process are let in
            while sent < count:
                path = target.random.choice(target.endpoints.sockets)
                with contextlib.suppress(*DEFENDED):
                    if path == target.endpoints.session:
                        sent += 1
                        with connect(path) as sock:
                            sock.sendall(self._start(target, b"", encode_preamble()))
                    elif target.random.random() < 0.8:
                        sent += 1
                        with connect(path) as sock:
                            sock.sendall(self._start(target, b"", GREETING, GREETING[:11]))
                    else:
                        with raw_zmq(path) as sock:
                            for _ in range(_PER_CONNECTION):
                                sent += 1
                                sock.sendall(zmtp_frame(self._noise(target)))
                            sock.recv(4096)  # refusals: they are read, and not all at once
        return sent

    def _noise(self, target: Target) -> bytes:
        return target.random.randbytes(int(10 ** target.random.uniform(0, 3.6)))

    def _start(self, target: Target, *beginnings: bytes) -> bytes:
        return target.random.choice(beginnings) + self._noise(target)


class WrongTypes(Attack):
    """Valid MessagePack that is no message: each is refused with a typed error."""

    name = "wrong-types"
    count = 25_000

    def run(self, target: Target, count: int) -> int:
        with target.session() as session, Dealer(target) as dealer:
            for sent in range(count):
                if sent % 20 == 0:
                    self._on_stream(target)
                    continue
                message = target.random.choice((self._value, self._request))(target, session.token)
                dealer.socket.send(msgpack.packb(message))
                expect_refusal(dealer.receive(), "bad-message", "too-large", "unauthorized")
        return count

    def _on_stream(self, target: Target) -> None:
        with contextlib.suppress(*DEFENDED), connect(target.endpoints.session) as sock:
            wrong = target.random.choice(
                [self._value(target), hello(name=[1]), hello(pid=-1), {"type": "welcome"}]
            )
            sock.sendall(encode_preamble() + frame(msgpack.packb(wrong)))
            sock.recv(65536)

    def _value(self, target: Target, token: bytes = b"", depth: int = 0) -> Any:
        chance = target.random
        kinds: list[Any] = [
            None, True, chance.getrandbits(63), -chance.getrandbits(63), chance.random(),
            chance.randbytes(40), "text" * chance.randrange(300), float("nan"), "",
            msgpack.ExtType(chance.randrange(127), b"ext"), msgpack.Timestamp(1, 2),
        ]  # fmt: skip
        if depth < 12:
            inner = self._value(target, token, depth + 1 + chance.randrange(4))
            kinds += [
                [inner] * chance.randrange(20),
                {"k": inner},
                {"type": inner},
                {"body": inner},
            ]
        return chance.choice(kinds)

    def _request(self, target: Target, token: bytes) -> Any:
        wrong = self._value(target)
        # A number in these places could be right.
        while isinstance(wrong, int | str | bytes):
            wrong = self._value(target)
        request: dict[str, Any] = {"token": token, "id": 1, "body": {"type": "ping"}}
        if target.random.random() < 0.5:
            request[target.random.choice(list(request))] = wrong
            return request
        bodies: list[dict[str, Any]] = [
            {"type": "commit", "region": wrong},
            {"type": "release", "lease": wrong},
            {"type": "attach", "device": "cpu", "fingerprint": wrong},
            {"type": "hand-over", "device": "cpu", "component": wrong},
            {"type": "evict", "device": wrong, "fingerprint": "nonce:" + "0" * 64},
            {"type": "cancel", "request": wrong},
            {"type": wrong},
        ]
        return {**request, "body": target.random.choice(bodies)}


def valid_requests(token: bytes) -> list[dict[str, Any]]:
    """One valid request of every kind."""
    fingerprint, thing = "nonce:" + secrets.token_hex(32), secrets.token_hex(16)
    component = {
        "fingerprint": fingerprint,
        "role": "vae",
        "label": "hostile",
        "tensors": [["a", "F32", [2, 3], 0, None], ["b", "BF16", [4], 512, [1]]],
    }
    bodies: list[dict[str, Any]] = [
        {"type": "ping"},
        {"type": "status"},
        {"type": "hand-over", "device": "cpu", "component": component},
        {"type": "attach", "device": "cpu", "fingerprint": fingerprint},
        {"type": "commit", "region": thing},
        {"type": "abandon", "region": thing},
        {"type": "release", "lease": thing},
        {"type": "evict", "device": "cpu", "fingerprint": fingerprint},
        {"type": "probe", "region": thing, "reader": "keeper", "offset": 0, "length": 32},
        {"type": "open-scratch", "number": 1, "nbytes": 4096, "instead_of": 1},
        {"type": "cancel", "request": 3},
        {"type": "await-task"},
        {"type": "finish-task", "task": 1, "data": b"x", "error": None},
    ]
    return [{"token": token, "id": number, "body": body} for number, body in enumerate(bodies)]


class Mutations(Attack):
    """Valid messages with flipped bits, cut short, lengthened, with fields twice."""

    name = "mutations"
    count = 40_000

    def run(self, target: Target, count: int) -> int:
        sent = 0
        while sent < count:
            # Some mutants are valid and leave requests open: a new session now and then.
            with target.session() as session, Dealer(target) as dealer, Dealer(target) as other:
                for _ in range(min(500, count - sent)):
                    valid = msgpack.packb(target.random.choice(valid_requests(session.token)))
                    dealer.socket.send(self._mutate(target, valid))
                    sent += 1
                    if sent % 50 == 0:
                        # Not faster than they are read: more would be refused unread.
                        other.ask(session.token, {"type": "ping"}, 2**40)
                        self._drain(dealer)
                        session.drain()
        return sent

    def _mutate(self, target: Target, data: bytes) -> bytes:
        chance = target.random
        match chance.randrange(4):
            case 0:
                flipped = bytearray(data)
                for _ in range(chance.randrange(1, 4)):
                    flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                return bytes(flipped)
            case 1:
                return data[: chance.randrange(len(data))]
            case 2:
                at = chance.randrange(len(data))
                return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
            case _:  # the envelope's map with one field twice
                field = chance.choice((b"\xa2id\x05", b"\xa4body\xc0", b"\xa5token\xc4\x00"))
                return bytes([data[0] + 1]) + data[1:] + field

    def _drain(self, dealer: Dealer) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(64):
                dealer.socket.recv(zmq.NOBLOCK)


class Bombs(Attack):
    """Messages within every limit that cost the most to read."""

    name = "bombs"
    count = 1_500

    @property
    def few(self) -> int:
        return 100

    def run(self, target: Target, count: int) -> int:
        lists = b"\xdc\x20\x00" + b"\x90" * 8192
        tensors = [[f"{i:05d}" + "x" * 200, "F32", [1] * 8, 512 * i, None] for i in range(8192)]
        component = {
            "fingerprint": "nonce:" + "0" * 64,
            "role": "vae",
            "label": "bomb",
            "tensors": [*tensors, tensors[0]],
        }
        with target.session() as session:
            token = msgpack.packb(session.token)
            head = b"\x84\xa5token" + token + b"\xa2id\x01\xa4body\x81\xa4type\xa4ping\xa1x"
            bombs = [
                b"\xdd" + (255).to_bytes(4, "big") + lists * 255,
                b"\xdd" + (255).to_bytes(4, "big") + lists.replace(b"\x90", b"\x80") * 255,
                # A valid ping in which a field of a newer minor version is the bomb.
                head + b"\xdd" + (255).to_bytes(4, "big") + lists * 255,
                b"\x91" * 2_000_000,
                head + b"\x91" * 2_000_000 + b"\x90",
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\xff\xff\xff\xff" + b"\xa1k\x01" * 600_000,
                b"\xc6\x7f\xff\xff\xff" + bytes(100_000),
                msgpack.packb(
                    {"token": session.token, "id": 2,
                     "body": {"type": "hand-over", "device": "cpu", "component": component}}
                ),
            ]  # fmt: skip
            dealers = [Dealer(target) for _ in range(8)]
            try:
                for sent in range(count):
                    dealer = dealers[sent % 8]
                    dealer.socket.send(bombs[sent % len(bombs)])
                    if sent >= 32:
                        dealer.receive()
            finally:
                for dealer in dealers:
                    dealer.__exit__()
        return count
