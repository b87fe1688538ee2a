"""Old clients are served by the daemon of today: their very bytes, over raw sockets.

Nothing of our own client or message types is used here, except for the daemon that is started.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from daemon_process import DaemonProcess, running_daemon

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("client-*.json"))
SECONDS = 20
MAJOR = 1
SCRATCH = 1 << 20  # bytes


@pytest.fixture
def cpu_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as running:
        yield running


class RawSession:
    """A session stream and a ZeroMQ socket, without our client."""

    def __init__(self, daemon: DaemonProcess, opening: bytes) -> None:
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream.settimeout(SECONDS)
        self.stream.connect(str(daemon.runtime_dir / "session.sock"))
        self.stream.sendall(opening)
        self.preamble = self._read(8)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.control = self._context.socket(zmq.DEALER)
        self.control.linger = 0
        self.control.rcvtimeo = SECONDS * 1000
        self.control.connect(f"ipc://{daemon.runtime_dir}/control.sock")
        self.descriptors: list[int] = []

    def __enter__(self) -> RawSession:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.stream.close()
        self.control.close()
        self._context.term()

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more, descriptors, _, _ = socket.recv_fds(self.stream, length - len(data), 1)
            if descriptors:
                self.descriptors += descriptors
            assert more, "the daemon closed the stream"
            data += more
        return data

    def frame(self) -> dict[str, Any]:
        """The next message on the stream."""
        return msgpack.unpackb(self._read(int.from_bytes(self._read(4), "big")))

    def ask(self, data: bytes) -> dict[str, Any]:
        """The answer to one request."""
        self.control.send(data)
        answer: dict[str, Any] = msgpack.unpackb(self.control.recv())
        return answer


def fill(session: RawSession, size: int) -> None:
    """Write the region whose descriptor comes next, and unmap it."""
    assert session.frame()["type"] == "descriptor"
    descriptor = session.descriptors.pop()
    with mmap.mmap(descriptor, size) as region:
        region[:4] = b"mine"
    os.close(descriptor)


def same(tree: Any) -> Any:
    return tree


def replay(daemon: DaemonProcess, path: Path, change: Callable[[Any], Any] = same) -> None:
    """Everything in a transcript, each message passed through ``change`` on the way."""
    script = json.loads(path.read_text())
    opening = bytes.fromhex(script["stream"])
    hello = msgpack.packb(change(msgpack.unpackb(opening[12:])))
    known = {script["region"]: "", script["lease"]: ""}

    def current(recorded: str) -> bytes:
        data = bytes.fromhex(recorded).replace(bytes.fromhex(script["token"]), token)
        for placeholder, value in known.items():
            data = data.replace(placeholder.encode(), value.encode() or placeholder.encode())
        return msgpack.packb(change(msgpack.unpackb(data)))

    with RawSession(daemon, opening[:8] + len(hello).to_bytes(4, "big") + hello) as session:
        assert session.preamble[:6] == opening[:6], "another major version"
        welcome = session.frame()
        assert welcome["type"] == "welcome"
        assert welcome.keys() >= {"session", "token", "boot_id", "daemon", "devices"}
        token = welcome["token"]
        for number, recorded in enumerate(script["requests"], 1):
            answer = session.ask(current(recorded["bytes"]))
            body = answer["body"]
            assert answer["id"] == number, recorded["name"]
            assert body["type"] == recorded["answer"], (recorded["name"], body)
            assert body.keys() >= set(recorded["keys"]), recorded["name"]
            if body["type"] == "fill":
                known[script["region"]] = body["grant"]["region"]
                fill(session, body["grant"]["nbytes"])
            elif body["type"] == "attached":
                known[script["lease"]] = body["lease"]
                assert session.frame()["number"] == body["grant"]["descriptor"]
                assert os.pread(session.descriptors[-1], 4, 0) == b"mine"
                assert body["component"]["tensors"][0][0] == "decoder.weight"
            elif body["type"] == "scratch-opened":
                assert session.frame()["number"] == body["descriptor"]
                assert os.fstat(session.descriptors[-1]).st_size == SCRATCH
                assert os.pwrite(session.descriptors[-1], b"mine", SCRATCH - 4) == 4
            elif body["type"] == "status-report":
                assert body["components"][0]["sessions"] == [welcome["session"]]
        assert daemon.wait_for_status(lambda status: not status.components)


def test_there_is_a_transcript_of_the_first_minor() -> None:
    assert [path.name for path in TRANSCRIPTS][:1] == [f"client-{MAJOR}.0.json"]


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_old_clients_are_served(path: Path, cpu_daemon: DaemonProcess) -> None:
    replay(cpu_daemon, path)


def with_newer_fields(tree: Any) -> Any:
    """The same message as a newer minor might send it: more optional fields everywhere."""
    if isinstance(tree, dict):
        known = {key: with_newer_fields(value) for key, value in tree.items()}
        return {**known, "newer": {"list": [1, 2.5, None], "text": "x"}}
    return tree


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_newer_minors_may_add_fields(path: Path, cpu_daemon: DaemonProcess) -> None:
    replay(cpu_daemon, path, with_newer_fields)


def opening_of(minor: int = 0, major: int = MAJOR) -> bytes:
    script = json.loads(TRANSCRIPTS[0].read_text())
    preamble = b"XDIT" + major.to_bytes(2, "big") + minor.to_bytes(2, "big")
    return preamble + bytes.fromhex(script["stream"])[8:]


def test_an_unknown_request_is_answered_and_the_session_goes_on(cpu_daemon: DaemonProcess) -> None:
    with RawSession(cpu_daemon, opening_of(minor=999)) as session:
        token = session.frame()["token"]

        def ask(number: int, **body: Any) -> dict[str, Any]:
            return session.ask(msgpack.packb({"token": token, "id": number, "body": body}))

        answer = ask(1, type="teleport", where="cpu")
        assert answer["id"] == 1, "the asker must find its answer"
        refused = answer["body"]
        assert refused["type"] == "failed"
        assert refused["code"] in ("unsupported", "bad-message")
        assert refused["message"]
        assert ask(2, type="ping")["body"]["type"] == "pong"
        assert ask(3, type="status")["body"]["type"] == "status-report"


@pytest.mark.parametrize(("major", "older"), [(0, "client"), (2, "daemon"), (65535, "daemon")])
def test_another_major_is_refused_in_words(
    major: int, older: str, cpu_daemon: DaemonProcess
) -> None:
    with RawSession(cpu_daemon, opening_of(major=major)) as session:
        assert session.preamble[:6] == b"XDIT" + MAJOR.to_bytes(2, "big")
        refused = session.frame()
        assert (refused["type"], refused["code"]) == ("refused", "version")
        assert f"the {older} is too old" in refused["message"]
        assert "update the" in refused["message"]
        assert f"{major}.0" in refused["message"]
        with pytest.raises((AssertionError, ConnectionError)):
            session.frame()
    with cpu_daemon.client() as client:
        assert client.ping()


def test_something_else_is_refused_in_words(cpu_daemon: DaemonProcess) -> None:
    with RawSession(cpu_daemon, b"GET / HTTP/1.1\r\n\r\n") as session:
        refused = session.frame()
        assert (refused["type"], refused["code"]) == ("refused", "bad-message")
