"""A ZeroMQ ROUTER on an ipc socket file, guarded.

What ZeroMQ does by itself: it refuses other uids at accept, drops a connection whose frame
announces too much, and bounds complete messages that wait. What it cannot do is done here: serve
processes in turn, bound the parts of a message, and from its connection events count connections,
say who was dropped, and shed connections when unfinished multipart messages (which no high-water
mark counts) make the process grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from ...protocol import limits
from ...protocol.endpoints import zmq_address
from ...protocol.peers import Peer, peer_of
from .doorman import Doorman, hide_routing_ids, peer_from_address
from .inbox import Inbox
from .log import log, logger

_TURN_SECONDS = 0.005  # reading, and then again working, before others on the loop have their turn
_EVENTS_PER_TURN = 256
_WAITING_PER_PROCESS = 2 * limits.REQUESTS_IN_FLIGHT
_WAITING_BYTES = limits.BULK_MESSAGE
_BACKLOG = 1024

# One received message: routing id for the answer, who sent it, its frames.
OnMessage = Callable[["Router", bytes, Peer, list[zmq.Frame]], None]
# A message is not worked on because too many of its process wait: routing id, who sent it.
OnOverload = Callable[["Router", bytes, Peer], None]


class _Message(NamedTuple):
    route: bytes
    frames: list[zmq.Frame]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.frames))


class Router:
    """Owns the socket and its file. Everything runs on the event loop's thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        path: Path,
        *,
        allowed: Iterable[int],
        shared: bool,
        frame_limit: int,
        part_limit: int,
        queue: int,
        on_message: OnMessage,
        on_overload: OnOverload,
        doorman: Doorman,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_overload = on_overload
        self._part_limit = part_limit
        self._parts: list[zmq.Frame] = []  # of the message that is being received
        self._inbox: Inbox[_Message] = Inbox(_WAITING_PER_PROCESS)
        self._path = path
        self._scheduled = False
        self._connections: dict[int, tuple[socket.socket, Peer]] = {}
        self._per_process: Counter[Peer] = Counter()
        self._events: deque[tuple[bool, int]] = deque()  # accepted or else disconnected, descriptor
        self._gone: Counter[int] = Counter()  # disconnections among them
        hide_routing_ids()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.zap_domain = path.stem.encode()
        self._socket.linger = 0
        self._socket.router_mandatory = True  # or what cannot be sent vanishes without a word
        self._socket.maxmsgsize = frame_limit
        self._socket.rcvhwm = self._socket.sndhwm = queue
        self._socket.sndbuf = limits.SOCKET_BUFFER
        self._socket.backlog = _BACKLOG
        for uid in allowed:
            self._socket.setsockopt(zmq.IPC_FILTER_UID, uid)
        address = f"inproc://monitor-{path.stem}"
        self._socket.monitor(address, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor = context.socket(zmq.PAIR)
        # Unbounded: a full queue would stop ZeroMQ's thread with a lock held that closing needs.
        self._monitor.rcvhwm = 0
        self._monitor.linger = 0
        self._monitor.connect(address)
        doorman.before_answer(self._take_events)
        path.unlink(missing_ok=True)
        before = os.umask(0o111 if shared else 0o177)
        try:
            self._socket.bind(zmq_address(path))
        finally:
            os.umask(before)
        self._loop.add_reader(_descriptor(self._socket), self._wake)
        self._loop.add_reader(_descriptor(self._monitor), self._watch_connections)
        self._wake()

    def send(self, routing_id: bytes, frames: Sequence[bytes | zmq.Frame]) -> bool:
        """Answer; whether it could be queued. Nobody waits for a peer that never reads."""
        try:
            self._socket.send_multipart([routing_id, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        finally:
            self._wake()
        return True

    def close(self) -> None:
        """Close the socket, its connections and its file."""
        self._loop.remove_reader(_descriptor(self._socket))
        self._loop.remove_reader(_descriptor(self._monitor))
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        for connection, _ in self._connections.values():
            connection.close()
        self._connections.clear()
        self._per_process.clear()
        self._path.unlink(missing_ok=True)

    # --- messages

    def _wake(self) -> None:
        # ZeroMQ's file descriptor signals changes only: look again after everything done here.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        if self._socket.closed:
            return
        try:
            more = self._receive()
            more = self._work() or more
        except Exception:  # noqa: BLE001  whatever happens, this socket is looked at again
            logger.exception("router-broke socket=%s", self._path.name)
            more = True
        if more:
            self._wake()

    def _receive(self) -> bool:
        """Sort what has arrived by process. Whether there may be more."""
        until = time.monotonic() + _TURN_SECONDS
        while self._inbox.nbytes < _WAITING_BYTES and time.monotonic() < until:
            try:
                frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            # One frame more than the limit is kept, which shows that there were too many.
            if len(self._parts) <= 1 + self._part_limit:
                self._parts.append(frame)
            if not frame.more:
                (route, *frames), self._parts = self._parts, []
                self._arrived(route.bytes, frames)
        return True

    def _arrived(self, route: bytes, frames: list[zmq.Frame]) -> None:
        peer = _sender(frames[0]) if frames else None
        if peer is not None and not self._inbox.put(peer, _Message(route, frames)):
            self._on_overload(self, route, peer)

    def _work(self) -> bool:
        """Work on one message of each process in turn. Whether some are left."""
        until = time.monotonic() + _TURN_SECONDS
        while (taken := self._inbox.take()) is not None:
            peer, message = taken
            self._on_message(self, message.route, peer, message.frames)
            if time.monotonic() > until:
                return True
        return False

    # --- connections

    def _watch_connections(self) -> None:
        if self._monitor.closed:
            return
        for _ in range(_EVENTS_PER_TURN):
            self._read_events(1)
            if not self._events:
                return
            self._take_event()
        self._loop.call_soon(self._watch_connections)

    def _take_events(self) -> None:
        """Learn of every connection so far: those that wait to be let in are still open."""
        self._read_events()
        for _ in range(len(self._events)):
            self._take_event()
        # What arrives meanwhile may have consumed the descriptor's signal.
        self._loop.call_soon(self._watch_connections)

    def _read_events(self, least: int | None = None) -> None:
        """Queue the reports of ZeroMQ's thread; none while ``least`` are queued already."""
        if least is not None and len(self._events) >= least:
            return
        for _ in range(_EVENTS_PER_TURN):
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            accepted = event["event"] == zmq.EVENT_ACCEPTED
            if not accepted:
                self._gone[event["value"]] += 1
            self._events.append((accepted, event["value"]))

    def _take_event(self) -> None:
        if not self._events:
            return
        accepted, descriptor = self._events.popleft()
        if accepted:
            self._accepted(descriptor)
            return
        self._gone[descriptor] -= 1
        if not self._gone[descriptor]:
            del self._gone[descriptor]
        self._disconnected(descriptor)

    def _accepted(self, descriptor: int) -> None:
        if self._gone[descriptor]:
            return
        try:
            duplicate = os.dup(descriptor)
        except OSError:
            return
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:  # no socket any more
            os.close(duplicate)
            return
        # libzmq reports a disconnection before it closes the descriptor: if the number means
        # something else by now, that report is there, or it is no socket of ours.
        self._read_events()
        try:
            if self._gone[descriptor] or connection.getsockname() != str(self._path):
                raise OSError("closed meanwhile")
            peer = peer_of(connection)
        except OSError:
            connection.close()
            return
        if (stale := self._connections.pop(descriptor, None)) is not None:
            self._forget(*stale)
        self._connections[descriptor] = (connection, peer)
        self._per_process[peer] += 1
        if len(self._connections) > limits.CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Cut the oldest connection of the process that has most of them."""
        ((crowd, count),) = self._per_process.most_common(1)
        for descriptor, (_, peer) in self._connections.items():
            if peer == crowd:
                log(
                    "connection-refused",
                    "warning",
                    reason=f"too many connections, {count} of this process",
                    socket=self._path.name,
                    uid=peer.uid,
                    pid=peer.pid,
                )
                self._cut(descriptor)
                return

    def _cut(self, descriptor: int) -> None:
        connection, peer = self._connections.pop(descriptor)
        with contextlib.suppress(OSError):  # it may be gone already
            connection.shutdown(socket.SHUT_RDWR)
        self._forget(connection, peer)

    def _forget(self, connection: socket.socket, peer: Peer) -> None:
        connection.close()
        self._per_process[peer] -= 1
        if not self._per_process[peer]:
            del self._per_process[peer]

    def _disconnected(self, descriptor: int) -> None:
        connection, peer = self._connections.pop(descriptor, (None, None))
        if connection is None or peer is None:
            return
        # Our duplicate keeps the connection open: if the peer has not hung up, ZeroMQ has.
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        if not any(events & select.POLLHUP for _, events in poller.poll(0)):
            log(
                "connection-dropped",
                "warning",
                reason="a frame larger than the limit, or not ZeroMQ",
                socket=self._path.name,
                uid=peer.uid,
                pid=peer.pid,
            )
        self._forget(connection, peer)

    def processes(self, which: Callable[[socket.socket], bool]) -> set[Peer]:
        """Those with a connection that ``which`` chooses."""
        return {peer for connection, peer in self._connections.values() if which(connection)}

    def shed(self, which: Callable[[socket.socket, Peer], bool]) -> int:
        """Cut the connections that ``which`` chooses.

        What they left unfinished is freed; honest clients connect again by themselves. Returns how
        many were cut.
        """
        found = list(self._connections.items())
        chosen = [(number, peer) for number, (sock, peer) in found if which(sock, peer)]
        for peer, count in Counter(peer for _, peer in chosen).items():
            log(
                "connections-shed",
                "warning",
                reason="unread messages take too much memory",
                socket=self._path.name,
                uid=peer.uid,
                pid=peer.pid,
                connections=count,
            )
        for number, _ in chosen:
            self._cut(number)
        return len(chosen)


def _descriptor(sock: zmq.Socket[bytes]) -> int:
    return int(sock.get(zmq.FD))


def _sender(frame: zmq.Frame) -> Peer | None:
    try:
        return peer_from_address(str(frame.get("Peer-Address")))
    except zmq.ZMQError:
        return None
