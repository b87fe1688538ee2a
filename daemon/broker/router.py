"""A ZeroMQ ROUTER on an ipc socket file, guarded.

What ZeroMQ does by itself: it refuses other uids at accept, drops a connection whose frame
announces too much, and bounds complete messages that wait. What it cannot do is done here from its
connection events: count connections, say who was dropped, and shed connections when unfinished
multipart messages (which no high-water mark counts) make the process grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from ...protocol import limits
from ...protocol.endpoints import zmq_address
from ...protocol.peers import Peer, peer_of
from .log import log

_MESSAGES_PER_TURN = 64
_BACKLOG = 1024

# One received message: routing id for the answer, who sent it, its frames.
OnMessage = Callable[["Router", bytes, Peer, list[zmq.Frame]], None]


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
        queue: int,
        on_message: OnMessage,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._path = path
        self._scheduled = False
        self._connections: dict[int, tuple[socket.socket, Peer]] = {}
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = frame_limit
        self._socket.rcvhwm = self._socket.sndhwm = queue
        self._socket.backlog = _BACKLOG
        for uid in allowed:
            self._socket.setsockopt(zmq.IPC_FILTER_UID, uid)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        path.unlink(missing_ok=True)
        before = os.umask(0o111 if shared else 0o177)
        try:
            self._socket.bind(zmq_address(path))
        finally:
            os.umask(before)
        self._loop.add_reader(_descriptor(self._socket), self._wake)
        self._loop.add_reader(_descriptor(self._monitor), self._watch_connections)
        self._wake()

    def send(self, routing_id: bytes, frames: list[bytes | zmq.Frame]) -> None:
        """Answer. A peer that never reads loses what exceeds its queue; nobody waits for it."""
        try:
            self._socket.send_multipart([routing_id, *frames], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            log("answer-dropped", "warning", reason="peer does not read", socket=self._path.name)
        self._wake()

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
        for _ in range(_MESSAGES_PER_TURN):
            try:
                routing_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = _sender(frames[0]) if frames else None
            if peer is not None:
                self._on_message(self, routing_id.bytes, peer, frames)
        self._wake()

    # --- connections

    def _watch_connections(self) -> None:
        while not self._monitor.closed and int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._accepted(event["value"])
            else:
                self._disconnected(event["value"])

    def _accepted(self, descriptor: int) -> None:
        # libzmq closes the descriptor after it reported the disconnection, so that it can have
        # been reused by now only if that report is already queued; then the duplicate that is
        # taken here belongs to a later connection and is dropped when the report is read.
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            return
        try:
            peer = peer_of(connection)
        except OSError:
            connection.close()
            return
        if (stale := self._connections.pop(descriptor, None)) is not None:
            stale[0].close()
        self._connections[descriptor] = (connection, peer)
        if len(self._connections) > limits.CONNECTIONS:
            log(
                "connection-refused",
                "warning",
                reason="too many connections",
                socket=self._path.name,
                uid=peer.uid,
                pid=peer.pid,
            )
            _shut(connection)

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
        connection.close()

    def shed(self, known: Callable[[Peer], bool]) -> int:
        """Cut connections to get back the memory of unfinished messages.

        Those of processes without a session first; all of them if there are none of those. Honest
        clients reconnect by themselves. Returns how many were cut.
        """
        strangers = [item for item in self._connections.values() if not known(item[1])]
        for connection, peer in strangers or self._connections.values():
            log(
                "connection-shed",
                "warning",
                reason="unread messages take too much memory",
                socket=self._path.name,
                uid=peer.uid,
                pid=peer.pid,
            )
            _shut(connection)
        return len(strangers or self._connections)


def _descriptor(sock: zmq.Socket[bytes]) -> int:
    return int(sock.get(zmq.FD))


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be gone already
        connection.shutdown(socket.SHUT_RDWR)


def _sender(frame: zmq.Frame) -> Peer | None:
    """Who sent a frame: libzmq renders SO_PEERCRED of ipc peers as localhost:uid:gid:pid."""
    try:
        _, uid, gid, pid = str(frame.get("Peer-Address")).split(":")
        return Peer(pid=int(pid), uid=int(uid), gid=int(gid))
    except (zmq.ZMQError, ValueError):
        return None
