"""Who may open a session, and whose requests are whose."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from xdit_sidecar.daemon.broker.sessions import Session, Sessions
from xdit_sidecar.daemon.settings import Settings
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.endpoints import Endpoints
from xdit_sidecar.protocol.errors import (
    BadMessage,
    Busy,
    NotAllowed,
    Unauthorized,
    VersionMismatch,
)
from xdit_sidecar.protocol.messages import Hello
from xdit_sidecar.protocol.peers import Peer
from xdit_sidecar.protocol.version import PROTOCOL_VERSION, ProtocolVersion

OWN, TRUSTED, STRANGER, NOBODY = 1000, 1001, 1002, 65534
HELLO = Hello(name="test", pid=1)


def peer(uid: int = OWN, pid: int = 100) -> Peer:
    return Peer(pid=pid, uid=uid, gid=uid)


def opened(sessions: Sessions, connection: int = 1, who: Peer | None = None) -> Session:
    who = who or peer()
    sessions.admit(0.0, connection, who)
    return sessions.greet(0.0, connection, who, HELLO)


# --- admission


@pytest.mark.parametrize("uid", [OWN, TRUSTED])
def test_named_accounts_get_in_and_share(uid: int) -> None:
    sessions = Sessions(frozenset({OWN, TRUSTED}))
    assert opened(sessions, who=peer(uid)).name in sessions.open
    assert sessions.domain_of(uid) == sessions.domain_of(OWN)


@pytest.mark.parametrize("uid", [STRANGER, NOBODY, 0])
def test_everyone_else_is_refused(uid: int) -> None:
    sessions = Sessions(frozenset({OWN, TRUSTED}))
    with pytest.raises(NotAllowed, match=f"uid {uid} .*--trust-uid"):
        sessions.admit(0.0, 1, peer(uid))
    assert sessions.domain_of(uid) != sessions.domain_of(OWN)
    assert sessions.late(1e9) == []


def test_nobody_gets_in_only_if_it_is_named() -> None:
    assert opened(Sessions(frozenset({OWN, NOBODY})), who=peer(NOBODY))


def test_the_daemons_own_account_is_always_allowed() -> None:
    settings = Settings(Endpoints(Path("/nowhere")), ("cpu",), trusted_uids=frozenset({TRUSTED}))
    assert settings.allowed_uids == {os.geteuid(), TRUSTED}
    assert settings.shared
    assert not Settings(Endpoints(Path("/nowhere")), ("cpu",)).shared


def test_ungreeted_connections_are_limited() -> None:
    sessions = Sessions(frozenset({OWN}))
    for connection in range(limits.UNGREETED_SESSIONS):
        sessions.admit(0.0, connection, peer())
    with pytest.raises(Busy, match="hello"):
        sessions.admit(0.0, 999, peer())
    sessions.end(0, None)
    sessions.admit(0.0, 999, peer())


def test_sessions_are_limited_also_when_the_hellos_come_late() -> None:
    sessions = Sessions(frozenset({OWN}))
    let_in = 0
    for connection in range(limits.SESSIONS + limits.UNGREETED_SESSIONS):
        if let_in < limits.SESSIONS - limits.UNGREETED_SESSIONS // 2:
            opened(sessions, connection)
            let_in += 1
            continue
        with contextlib.suppress(Busy):
            sessions.admit(0.0, connection, peer())
            let_in += 1
    assert let_in == limits.SESSIONS
    with pytest.raises(Busy, match=f"its limit is {limits.SESSIONS}"):
        sessions.admit(0.0, 999, peer())
    for connection in sessions.late(100.0):
        sessions.greet(100.0, connection, peer(), HELLO)
    assert len(sessions.open) == limits.SESSIONS


def test_ended_sessions_make_room() -> None:
    sessions = Sessions(frozenset({OWN}))
    many = [opened(sessions, connection) for connection in range(limits.SESSIONS)]
    with pytest.raises(Busy):
        sessions.admit(0.0, 999, peer())
    sessions.end(0, many[0])
    assert opened(sessions, 999).name != many[0].name


def test_late_hellos() -> None:
    sessions = Sessions(frozenset({OWN}))
    sessions.admit(0.0, 1, peer())
    sessions.admit(3.0, 2, peer())
    assert sessions.late(limits.HELLO_SECONDS) == []
    assert sessions.late(limits.HELLO_SECONDS + 0.1) == [1]
    sessions.greet(1.0, 1, peer(), HELLO)
    assert sessions.late(100.0) == [2]
    sessions.end(2, None)
    assert sessions.late(100.0) == []


@pytest.mark.parametrize(("major", "older"), [(0, "client"), (2, "daemon")])
def test_other_major_versions_are_refused(major: int, older: str) -> None:
    with pytest.raises(VersionMismatch, match=f"the {older} is too old"):
        Sessions.check_version(ProtocolVersion(major, 0))
    Sessions.check_version(ProtocolVersion(PROTOCOL_VERSION.major, 999))


# --- tokens


def test_a_token_works_for_its_own_process_only() -> None:
    sessions = Sessions(frozenset({OWN, TRUSTED}))
    session = opened(sessions)
    assert sessions.authorize(session.token, peer()) is session
    for other in (peer(pid=101), peer(uid=TRUSTED), peer(uid=TRUSTED, pid=101)):
        with pytest.raises(Unauthorized, match="belongs to pid 100"):
            sessions.authorize(session.token, other)


def test_a_token_ends_with_its_session() -> None:
    sessions = Sessions(frozenset({OWN}))
    session = opened(sessions)
    sessions.end(1, session)
    sessions.end(1, session)
    with pytest.raises(Unauthorized, match="connect again"):
        sessions.authorize(session.token, peer())
    with pytest.raises(Unauthorized):
        sessions.authorize(b"\0" * 32, peer())


def test_tokens_are_unique_and_long() -> None:
    sessions = Sessions(frozenset({OWN}))
    tokens = {opened(sessions, connection).token for connection in range(limits.SESSIONS)}
    assert len(tokens) == limits.SESSIONS
    assert {len(token) for token in tokens} == {32}


def test_tokens_are_in_no_text() -> None:
    sessions = Sessions(frozenset({OWN}), new_token=lambda: b"secret-secret-secret-secret-1234")
    session = opened(sessions)
    texts = [repr(session), str(session)]
    for token, who in ((session.token, peer(pid=2)), (b"another-secret-" * 2 + b"xx", peer())):
        with pytest.raises(Unauthorized) as refused:
            sessions.authorize(token, who)
        texts += [str(refused.value), repr(refused.value)]
    assert not any("secret" in text for text in texts)


# --- requests


def test_unanswered_requests_are_counted() -> None:
    session = opened(Sessions(frozenset({OWN})))
    for request in range(limits.REQUESTS_IN_FLIGHT):
        Sessions.begin_request(session, request)
    with pytest.raises(Busy) as refused:
        Sessions.begin_request(session, 999)
    assert refused.value.retryable
    session.requests.discard(0)
    Sessions.begin_request(session, 999)


def test_a_number_cannot_be_used_twice_at_once() -> None:
    session = opened(Sessions(frozenset({OWN})))
    Sessions.begin_request(session, 7)
    with pytest.raises(BadMessage, match="7"):
        Sessions.begin_request(session, 7)
    session.requests.discard(7)
    Sessions.begin_request(session, 7)
