"""Who may talk to the daemon, and who is talking. A pure state machine.

A session is one stream connection. It is *ungreeted* until a valid hello arrives in time, then
*open* until its stream ends. Its token is the only thing that binds ZeroMQ requests to it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol import limits
from ...protocol.errors import BadMessage, Busy, NotAllowed, Unauthorized, VersionMismatch
from ...protocol.messages import Hello
from ...protocol.peers import Peer
from ...protocol.version import PROTOCOL_VERSION, ProtocolVersion, explain_mismatch


@dataclass(slots=True)
class Session:
    """One open session."""

    name: str  # "s12": short, for people and logs; authorises nothing
    peer: Peer
    hello: Hello
    token: bytes = field(repr=False)
    opened: float = 0.0
    requests: set[int] = field(default_factory=set)  # unanswered


class Sessions:
    """``allowed`` uids get in; those in it share components with each other.

    uid 65534 (nobody) is what a process of an unmapped user namespace looks like: it gets in only
    if it is named.
    """

    def __init__(
        self,
        allowed: frozenset[int],
        *,
        new_token: Callable[[], bytes] = lambda: secrets.token_bytes(32),
    ) -> None:
        self.allowed = allowed
        self.open: dict[str, Session] = {}
        self._new_token = new_token
        self._ungreeted: dict[int, float] = {}  # connection -> when accepted
        self._by_token: dict[bytes, Session] = {}
        self._counter = 0

    def domain_of(self, uid: int) -> str:
        """The name of the group of uids that shares components with this one."""
        return "+".join(map(str, sorted(self.allowed))) if uid in self.allowed else f"uid{uid}"

    def admit(self, now: float, connection: int, peer: Peer) -> None:
        """A stream was accepted. Raises NotAllowed or Busy; then it is to be refused."""
        if peer.uid not in self.allowed:
            raise NotAllowed(
                f"uid {peer.uid} may not use this daemon: start one of your own, or have its "
                "owner add your uid with --trust-uid"
            )
        if len(self._ungreeted) >= limits.UNGREETED_SESSIONS:
            raise Busy(
                f"{len(self._ungreeted)} connections have not said hello yet: they are dropped "
                f"after {limits.HELLO_SECONDS:.0f} s, try again then"
            )
        # Who has been let in must also find room when it says hello.
        if len(self.open) + len(self._ungreeted) >= limits.SESSIONS:
            raise Busy(
                f"the daemon has {len(self.open)} sessions, its limit is {limits.SESSIONS}: "
                "close clients that are not needed"
            )
        self._ungreeted[connection] = now

    @staticmethod
    def check_version(client: ProtocolVersion) -> None:
        """Raises VersionMismatch for another major version."""
        if (text := explain_mismatch(PROTOCOL_VERSION, client)) is not None:
            raise VersionMismatch(text)

    def greet(self, now: float, connection: int, peer: Peer, hello: Hello) -> Session:
        """A hello arrived: open the session."""
        del self._ungreeted[connection]
        self._counter += 1
        session = Session(f"s{self._counter}", peer, hello, self._new_token(), now)
        self.open[session.name] = session
        self._by_token[session.token] = session
        return session

    def end(self, connection: int, session: Session | None) -> None:
        """The stream is gone."""
        self._ungreeted.pop(connection, None)
        if session is not None and self.open.pop(session.name, None) is not None:
            del self._by_token[session.token]

    @property
    def ungreeted(self) -> list[int]:
        """Connections that have not said hello, oldest first."""
        return list(self._ungreeted)

    def late(self, now: float) -> list[int]:
        """Connections that have not said hello in time."""
        deadline = now - limits.HELLO_SECONDS
        return [connection for connection, since in self._ungreeted.items() if since < deadline]

    def authorize(self, token: bytes, peer: Peer) -> Session:
        """The session of a ZeroMQ request. Raises Unauthorized.

        The kernel says which process sent it: a token does not work for another one.
        """
        session = self._by_token.get(token)
        if session is None:
            raise Unauthorized(
                "no open session has this token: the daemon restarted or the session ended; "
                "connect again"
            )
        if (session.peer.uid, session.peer.pid) != (peer.uid, peer.pid):
            raise Unauthorized(
                f"this token belongs to pid {session.peer.pid}, not to pid {peer.pid}: every "
                "process opens a session of its own (also after a fork)"
            )
        return session

    @staticmethod
    def begin_request(session: Session, request: int) -> None:
        """Account for a request. Raises Busy, or BadMessage for an id that is still open."""
        if request in session.requests:
            raise BadMessage(f"the request id {request} belongs to an unanswered request")
        if len(session.requests) >= limits.REQUESTS_IN_FLIGHT:
            raise Busy(
                f"this session has {limits.REQUESTS_IN_FLIGHT} unanswered requests: wait for them"
            )
        session.requests.add(request)
