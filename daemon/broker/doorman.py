"""Decides which ZeroMQ connections come in (ZAP, RFC 27), before they can send anything.

libzmq asks for every connection and holds its handshake until the answer. That makes two things
possible: everything about a connection is known before its first message, and connections of one
process are limited in rate. The second protects the process itself: a ROUTER numbers its anonymous
peers one after the other, and libzmq 4.3.5 aborts when the next number is a routing id that a peer
has chosen for itself. The first number is made unpredictable (:func:`hide_routing_ids`); the rate
keeps a peer from trying many.
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
import time
from collections.abc import Callable

import zmq

from ...protocol.peers import Peer
from .log import log, logger

ENDPOINT = "inproc://zeromq.zap.01"
_PER_TURN = 256
# Connections that a process may open at once, and per second from then on. A client opens one for
# each of its threads that waits; those of all processes without a session count together.
_BURST, _PER_SECOND = 512.0, 32.0
_STRANGERS_BURST, _STRANGERS_PER_SECOND = 64.0, 16.0
_FORGET_SECONDS = 60.0


def hide_routing_ids() -> None:
    """Call before a ROUTER is made: libzmq draws its first routing id from C's unseeded rand()."""
    ctypes.CDLL(None).srandom(secrets.randbits(32))


def peer_from_address(address: str) -> Peer | None:
    """libzmq renders SO_PEERCRED of ipc peers as ``localhost:uid:gid:pid``."""
    try:
        _, uid, gid, pid = address.split(":")
        return Peer(pid=int(pid), uid=int(uid), gid=int(gid))
    except ValueError:
        return None


class Allowance:
    """A token bucket per key. Pure."""

    def __init__(self, burst: float, per_second: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._left: dict[object, tuple[float, float]] = {}  # key -> tokens, at

    def take(self, now: float, key: object) -> bool:
        """One token of ``key``, if it has one left."""
        tokens, at = self._left.get(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._per_second)
        if tokens < 1.0:
            self._left[key] = tokens, now
            return False
        self._left[key] = tokens - 1.0, now
        return True

    def forget(self, now: float) -> None:
        """Drop what was not used for a minute."""
        self._left = {
            key: left for key, left in self._left.items() if now - left[1] < _FORGET_SECONDS
        }


class Doorman:
    """Answers libzmq's questions for all sockets of a context. Make it before they are bound."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], known: Callable[[Peer], bool]
    ) -> None:
        self._known = known
        self._before_answer: list[Callable[[], None]] = []
        self._processes = Allowance(_BURST, _PER_SECOND)
        self._strangers = Allowance(_STRANGERS_BURST, _STRANGERS_PER_SECOND)
        self._forgot = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ENDPOINT)
        self._descriptor = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)

    def before_answer(self, call: Callable[[], None]) -> None:
        """``call()`` before connections are let in; routers learn of them there."""
        self._before_answer.append(call)

    def close(self) -> None:
        """Answer no more."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close(0)

    def _look(self) -> None:
        if self._socket.closed:
            return
        for _ in range(_PER_TURN):
            try:
                question = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                verdict = self._verdict(question)
            except Exception:  # noqa: BLE001  without an answer there would be no next question
                logger.exception("doorman-broke")
                verdict = b"500"
            request = question[1] if len(question) > 1 else b""
            self._socket.send_multipart([b"1.0", request, verdict, b"", b"", b""])
        self._loop.call_soon(self._look)

    def _verdict(self, question: list[bytes]) -> bytes:
        _, _, domain, address, *_ = question
        for call in self._before_answer:
            call()
        # 300 is "temporary": the connection is closed and an honest client tries again.
        return b"200" if self._admit(address.decode(), domain.decode()) else b"300"

    def _admit(self, address: str, domain: str) -> bool:
        peer, now = peer_from_address(address), time.monotonic()
        if peer is None:
            return False
        if now - self._forgot > _FORGET_SECONDS:
            self._forgot = now
            self._processes.forget(now)
        admitted = (
            self._processes.take(now, (domain, peer))
            if self._known(peer)
            else self._strangers.take(now, (domain, peer.uid))
        )
        if not admitted:
            log(
                "connection-refused",
                "warning",
                reason="too many connections in a short time",
                socket=domain,
                uid=peer.uid,
                pid=peer.pid,
            )
        return admitted
