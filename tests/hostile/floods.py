"""Too much of it: parts, bytes, announced bytes."""

from __future__ import annotations

import contextlib
import struct

import msgpack
import zmq
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.version import encode_preamble

from hostile.attack import DEFENDED, Attack, Dealer, Target, expect_refusal
from hostile.wire import connect, frame, hello, is_cut, raw_zmq, zmtp_frame

_PER_CHANNEL = 10
_ENOUGH = 900  # descriptors; fewer than a session may have leases
_MOST = 3 * limits.GIB  # of one message that never ends, when nobody stops us


class ManyParts(Attack):
    """Complete messages of thousands of parts: refused, and nothing else happens."""

    name = "many-parts"
    count = 1_000
    fills_memory = True

    def run(self, target: Target, count: int) -> int:
        with target.session() as session:
            request = {"token": session.token, "id": 1, "body": {"type": "echo"}}
            for sent in range(0, count, _PER_CHANNEL):
                with Dealer(target, bulk=sent // _PER_CHANNEL % 2 == 1) as dealer:
                    for _ in range(_PER_CHANNEL):
                        parts = [b"x"] * target.random.choice((limits.BULK_PARTS, 1_000, 20_000))
                        dealer.socket.send_multipart([msgpack.packb(request), *parts])
                        expect_refusal(dealer.receive(), "too-large")
        return count


class EndlessMessages(Attack):
    """Multipart messages that never end, from a process without a session: they are shed."""

    name = "endless-messages"
    count = 100
    fills_memory = True
    logged = "connections-shed"
    known = False

    @property
    def few(self) -> int:
        return 2

    def run(self, target: Target, count: int) -> int:
        with target.session() if self.known else contextlib.nullcontext():
            for number in range(count):
                part = zmtp_frame(bytes(target.random.choice((64, 4_096, 262_144))), more=True)
                chunk = part * (1 + 1_048_576 // len(part))
                path = (target.endpoints.control, target.endpoints.bulk)[number % 2]
                sent = 0
                with contextlib.suppress(*DEFENDED), raw_zmq(path) as sock:
                    while sent < _MOST:
                        sock.sendall(chunk)
                        sent += len(chunk)
                assert sent < _MOST, "a message without an end was let through"
        return count


class EndlessFromSession(EndlessMessages):
    """The same from a process that has a session: it is shed, too."""

    name = "endless-from-session"
    known = True


class Requests(Attack):
    """Valid requests on many channels and sessions, as fast as it goes: others have their turn."""

    name = "requests"
    count = 100_000
    fills_memory = True

    def run(self, target: Target, count: int) -> int:
        with contextlib.ExitStack() as held:
            sessions = [held.enter_context(target.session()) for _ in range(16)]
            dealers = [held.enter_context(Dealer(target)) for _ in range(64)]
            for number in range(count):
                dealer = dealers[number % len(dealers)].socket
                body = {"type": ("ping", "ping", "ping", "status")[number % 4]}
                token = sessions[number % len(sessions)].token
                with contextlib.suppress(zmq.Again):
                    dealer.send(
                        msgpack.packb({"token": token, "id": number, "body": body}), zmq.NOBLOCK
                    )
                    dealer.recv(zmq.NOBLOCK)
        return count


class Oversized(Attack):
    """Frames that announce more than the limit: the connection is dropped, and logged."""

    name = "oversized"
    count = 2_000
    logged = "connection-dropped"

    def run(self, target: Target, count: int) -> int:
        sizes = (0, 1, 1_000_000, 2**31, 2**63 - 1)
        with target.session():
            for number in range(count):
                more = target.random.choice(sizes)
                with contextlib.suppress(*DEFENDED):
                    if number % 2:
                        with connect(target.endpoints.session) as sock:
                            length = min(limits.STREAM_FRAME + 1 + more, 2**32 - 1)
                            start = encode_preamble() + frame(hello()) * (number % 4 == 1)
                            sock.sendall(start + struct.pack("!I", length) + bytes(100))
                            assert is_cut(sock), "an oversized frame was taken"
                    else:
                        bulk = number % 4 == 2
                        limit = limits.BULK_FRAME if bulk else limits.CONTROL_FRAME
                        path = target.endpoints.bulk if bulk else target.endpoints.control
                        with raw_zmq(path) as sock:
                            announced = min(limit + 1 + more, 2**63 - 1)
                            sock.sendall(zmtp_frame(bytes(100), announced=announced))
                            assert is_cut(sock), "an oversized frame was taken"
        return count


class Deaf(Attack):
    """Asks for status, echoes and descriptors and never reads an answer."""

    name = "deaf"
    count = 20_000
    fills_memory = True
    logged = "dropped: the client does not read"

    def run(self, target: Target, count: int) -> int:
        component = {
            "fingerprint": "bytes:" + "d" * 64,
            "role": "vae",
            "label": "deaf",
            "tensors": [["a", "U8", [64], 0, None]],
        }
        hand_over = {"type": "hand-over", "device": "cpu", "component": component}
        with target.session() as session, Dealer(target) as dealer:
            dealer.socket.send(msgpack.packb({"token": session.token, "id": 1, "body": hand_over}))
            region = dealer.receive()["grant"]["region"]  # type: ignore[index]
            session.drain()
            dealer.ask(session.token, {"type": "commit", "region": region})
            attach = {"type": "attach", "device": "cpu", "fingerprint": component["fingerprint"]}
            for _ in range(_ENOUGH):  # a descriptor for each on the stream, which we never read
                try:
                    if dealer.ask(session.token, attach)["type"] == "failed":
                        break
                except zmq.Again:
                    break  # dropped while it was asking: nobody answers a session that is gone
            else:
                raise AssertionError("a client that does not read is given more and more")
        bodies = [{"type": "status"}, attach, {"type": "ping"}]
        with (
            target.session() as session,
            Dealer(target) as dealer,
            Dealer(target, bulk=True) as bulk,
        ):
            dealer.socket.rcvhwm = bulk.socket.rcvhwm = 1
            self._ask(count, session.token, bodies, dealer, bulk)
        return count

    def _ask(
        self,
        count: int,
        token: bytes,
        bodies: list[dict[str, str]],
        dealer: Dealer,
        bulk: Dealer,
    ) -> None:
        echo = msgpack.packb({"token": token, "id": 1, "body": {"type": "echo"}})
        for number in range(count):
            with contextlib.suppress(zmq.Again):
                if number % 20 == 0:
                    bulk.socket.send_multipart([echo, bytes(1_048_576)], zmq.NOBLOCK)
                    continue
                body = bodies[number % len(bodies)]
                request = {"token": token, "id": 10 + number, "body": body}
                dealer.socket.send(msgpack.packb(request), zmq.NOBLOCK)
