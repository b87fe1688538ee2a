"""The session socket: accepts streams, greets or refuses them, notices their end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Protocol

from ...protocol import codec, limits
from ...protocol.errors import BadMessage, Busy, SidecarError
from ...protocol.frames import FrameStream, StreamClosed
from ...protocol.messages import Descriptor, Hello, Refused, StreamMessage, Welcome
from ...protocol.peers import Peer, peer_of
from ...protocol.version import (
    PREAMBLE_BYTES,
    NotOurProtocol,
    decode_preamble,
    encode_preamble,
)
from .log import log
from .sessions import Session, Sessions

_BACKLOG = 1024
_ACCEPT_PAUSE_SECONDS = 0.2
_ACCEPTS_PER_TURN = 32
# Messages that the kernel does not take: each may hold a descriptor of ours open.
_UNSENT = 32


class SessionHost(Protocol):
    """What the gate needs to know from the broker."""

    def welcome(self, session: Session) -> Welcome: ...

    def session_ended(self, session: Session) -> None: ...


class Connection:
    """One accepted stream, from accept to close."""

    def __init__(self, gate: Gate, sock: socket.socket, peer: Peer) -> None:
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self.peer = peer
        self.session: Session | None = None
        self._stream = FrameStream(sock)
        self._greeted = False  # preamble seen
        self._descriptors = 0
        self._unsent = 0  # messages queued since the client last read everything
        self._loop.add_reader(self._stream, self._readable)
        self._stream.queue_raw(encode_preamble())
        self._flush()

    def send(self, message: StreamMessage, descriptor: int | None = None) -> None:
        """Queue a message; a client that does not read is dropped. Takes over ``descriptor``."""
        try:
            self._stream.queue_frame(codec.encode(message), descriptor)
        except StreamClosed as error:
            # Not from within whatever is being carried out: the catalog is not re-entrant.
            self._loop.call_soon(self.close, f"dropped: {error}")
            return
        self._flush()
        if not self.closed and self._stream.has_unsent:
            self._unsent += 1
            if self._unsent > _UNSENT:
                self._loop.call_soon(self.close, "dropped: the client does not read")

    def send_descriptor(self, descriptor: int, request: int = 0) -> int:
        """Send a descriptor ahead of the answer (to ``request``) that names it: its number."""
        self._descriptors += 1
        self.send(Descriptor(self._descriptors, request), descriptor)
        return self._descriptors

    def refuse(self, error: SidecarError) -> None:
        """Say why and close."""
        log("session-refused", "warning", facts=self.facts, code=error.code, error=str(error))
        self.send(Refused(error.code, str(error)[: limits.TEXT]))
        self.close("refused")

    @property
    def facts(self) -> dict[str, str | int]:
        """Who this is, for the log."""
        name = self.session.name if self.session else "-"
        return {"session": name, "uid": self.peer.uid, "pid": self.peer.pid}

    def _readable(self) -> None:
        try:
            self._stream.read_available()
            if not self._greeted:
                if (preamble := self._stream.take_preamble(PREAMBLE_BYTES)) is None:
                    return
                self._gate.sessions.check_version(decode_preamble(preamble))
                self._greeted = True
            while not self.closed and (frame := self._stream.take_frame()) is not None:
                self._received(codec.decode(frame, StreamMessage, limit=limits.STREAM_FRAME))
        except StreamClosed:
            self.close("the client closed it")
        except NotOurProtocol as error:
            self.refuse(BadMessage(str(error)))
        except SidecarError as error:
            self.refuse(error)

    def _received(self, message: StreamMessage) -> None:
        if self.session is not None or not isinstance(message, Hello):
            raise BadMessage("the only message that a client sends on this stream is one hello")
        self.session = self._gate.greet(self, message)
        log("session-opened", facts=self.facts, name=message.name)
        self.send(self._gate.host.welcome(self.session))

    def _flush(self) -> None:
        if self.closed:
            return
        try:
            self._stream.flush()
        except StreamClosed as error:
            # Not always noticed by the reader: the kernel may refuse to take one more descriptor.
            self._loop.remove_writer(self._stream)
            self._loop.call_soon(self._hang_up, f"dropped: {error}")
            return
        if self._stream.has_unsent:
            self._loop.add_writer(self._stream, self._flush)
        else:
            self._unsent = 0
            self._loop.remove_writer(self._stream)

    def _hang_up(self, reason: str) -> None:
        if not self.closed:
            self._readable()  # what the client sent before it closed
        self.close(reason)

    @property
    def closed(self) -> bool:
        return self._stream.sock.fileno() < 0

    def close(self, reason: str) -> None:
        """End the session, with everything that hangs on it."""
        if self.closed:
            return
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        self._stream.close()
        self._gate.forget(self, reason)


class Gate:
    """Listens on the session socket. Everything runs on the event loop's thread."""

    def __init__(self, path: Path, *, mode: int, sessions: Sessions, host: SessionHost) -> None:
        self.sessions = sessions
        self.host = host
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._connections: dict[int, Connection] = {}
        self._by_session: dict[str, Connection] = {}
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o777 & ~mode)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)

    def connection_of(self, session: str) -> Connection | None:
        """The stream of an open session."""
        return self._by_session.get(session)

    def greet(self, connection: Connection, hello: Hello) -> Session:
        """A hello arrived: open the session and welcome it."""
        session = self.sessions.greet(time.monotonic(), id(connection), connection.peer, hello)
        self._by_session[session.name] = connection
        return session

    def drop_late(self) -> None:
        """Call about once a second: closes streams that never said hello."""
        for key in self.sessions.late(time.monotonic()):
            if (connection := self._connections.get(key)) is not None:
                connection.refuse(BadMessage(f"no hello within {limits.HELLO_SECONDS:.0f} s"))

    def forget(self, connection: Connection, reason: str) -> None:
        """A connection is closed."""
        self._connections.pop(id(connection), None)
        session = connection.session
        self.sessions.end(id(connection), session)
        if session is not None:
            self._by_session.pop(session.name, None)
            log("session-ended", facts=connection.facts, reason=reason)
            self.host.session_ended(session)

    def close(self) -> None:
        """Stop listening and end every session."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for connection in list(self._connections.values()):
            connection.close("the daemon stops")

    def _listen_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError as error:  # out of descriptors: look again when some may be free
            log("accept-failed", "warning", error=str(error))
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._listen_again)
            return False
        try:
            peer = peer_of(sock)
            connection = Connection(self, sock, peer)
        except OSError:
            sock.close()
            return True
        self._connections[id(connection)] = connection
        self._make_room()
        try:
            self.sessions.admit(time.monotonic(), id(connection), peer)
        except SidecarError as error:
            connection.refuse(error)
        return True

    def _make_room(self) -> None:
        """Drop the oldest silent stream of the process that has most, when there are too many.

        Honest clients say hello at once: streams that do not must not keep them out.
        """
        silent = [
            found
            for key in self.sessions.ungreeted
            if (found := self._connections.get(key)) is not None
        ]
        if len(silent) < limits.UNGREETED_SESSIONS:
            return
        ((crowd, _),) = Counter(found.peer for found in silent).most_common(1)
        oldest = next(found for found in silent if found.peer == crowd)
        oldest.refuse(Busy("too many connections of this process have not said hello"))
