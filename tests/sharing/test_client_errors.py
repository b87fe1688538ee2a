"""Every way in which a daemon cannot be used has its own clear error."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import components
import pytest
from daemon_process import DaemonProcess, running_daemon
from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol import endpoints as endpoints_module
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.endpoints import (
    RUNTIME_DIR_VARIABLE,
    client_places,
    resolve_runtime_dir,
)
from xdit_sidecar.protocol.errors import (
    BadMessage,
    Busy,
    DaemonAbsent,
    DaemonLost,
    DeadlineExceeded,
    SidecarError,
    VersionMismatch,
)
from xdit_sidecar.protocol.messages import Refused
from xdit_sidecar.protocol.version import ProtocolVersion, encode_preamble


@contextlib.contextmanager
def answering(runtime_dir: Path, answer: bytes) -> Iterator[None]:
    """Something that listens where the daemon should and answers each connection with bytes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / "session.sock"))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(answer)
                        connection.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def refusal(error: SidecarError, version: ProtocolVersion) -> bytes:
    payload = codec.encode(Refused(error.code, str(error)))
    return encode_preamble(version) + len(payload).to_bytes(4, "big") + payload


def raised_by_ping(runtime_dir: Path, timeout: float = 2.0) -> SidecarError:
    with Client(runtime_dir) as client, pytest.raises(SidecarError) as caught:
        client.ping(timeout=timeout)
    return caught.value


def test_an_absent_daemon(tmp_path: Path) -> None:
    error = raised_by_ping(tmp_path)
    assert isinstance(error, DaemonAbsent)
    assert "xdit-sidecar serve" in str(error)
    assert str(tmp_path) in str(error)


def test_a_session_that_has_ended_says_why(tmp_path: Path) -> None:
    """Also to those who ask a moment too late to hear it."""
    with running_daemon(tmp_path) as daemon, daemon.client() as client:
        session = client.session(Deadline(5.0))
        os.kill(daemon.pid, signal.SIGKILL)
        assert session.lost.wait(10)
        for channels in (session.control, session.bulk):
            with (
                pytest.raises(DaemonLost, match="it stopped, restarted or crashed"),
                channels.channel(),
            ):
                pass


def test_a_stale_socket_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "session.sock"))
    assert isinstance(raised_by_ping(tmp_path), DaemonAbsent)


@pytest.mark.parametrize(("major", "older"), [(0, "daemon"), (7, "client")])
def test_another_major_version(tmp_path: Path, major: int, older: str) -> None:
    version = ProtocolVersion(major, 3)
    sentence = VersionMismatch(f"the {older} is too old; update it")
    with answering(tmp_path, refusal(sentence, version)):
        error = raised_by_ping(tmp_path)
    assert isinstance(error, VersionMismatch)
    assert older in str(error)


def test_another_program_on_the_socket(tmp_path: Path) -> None:
    with answering(tmp_path, b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        error = raised_by_ping(tmp_path)
    assert isinstance(error, BadMessage)
    assert "something else listens" in str(error)


def test_a_socket_that_accepts_and_says_nothing(tmp_path: Path) -> None:
    with answering(tmp_path, b""):
        assert isinstance(raised_by_ping(tmp_path, 0.3), DaemonLost | DeadlineExceeded)


def test_a_full_daemon(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(limits.SESSIONS + 1)]
        *fitting, last = clients
        for client in fitting:
            client.ping()
        with pytest.raises(Busy, match="close clients"):
            last.ping()
        clients[0].close()
        end = time.monotonic() + 10
        while True:  # until its end is noticed
            try:
                last.ping()
                break
            except Busy:
                assert time.monotonic() < end
                time.sleep(0.01)


def test_too_many_requests_of_one_session(daemon: DaemonProcess) -> None:
    component = components.describe(components.random_tensors())
    refused: list[BaseException] = []

    def wait(client: Client) -> None:
        try:
            client.hand_over(component, "cpu", components.must_not_fill, timeout=1.5)
        except DeadlineExceeded:
            pass
        except Busy as error:
            refused.append(error)

    with daemon.client() as filler, daemon.client() as asker:
        with filler.open_fill(component, "cpu"):
            asker.ping()
            threads = [
                threading.Thread(target=wait, args=(asker,))
                for _ in range(limits.REQUESTS_IN_FLIGHT + 5)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert refused
        asker.ping()


def test_the_runtime_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, "/tmp/a")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/b")
    assert resolve_runtime_dir("/tmp/c").directory == Path("/tmp/c")
    assert resolve_runtime_dir().directory == Path("/tmp/a")
    monkeypatch.delenv(RUNTIME_DIR_VARIABLE)
    assert resolve_runtime_dir().directory == Path("/tmp/b/xdit-sidecar")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert resolve_runtime_dir().directory == Path("/run/xdit-sidecar")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SidecarError, match="--runtime-dir"):
        resolve_runtime_dir()
    with pytest.raises(SidecarError, match="too long"):
        resolve_runtime_dir("/tmp/" + "x" * 100)


def test_where_clients_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def looked(given: str | None = None) -> list[str]:
        return [str(place.directory) for place in client_places(given)]

    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, "/tmp/a")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/b")
    assert looked("/tmp/c") == ["/tmp/c"]
    assert looked() == ["/tmp/a"]
    monkeypatch.delenv(RUNTIME_DIR_VARIABLE)
    assert looked() == ["/tmp/b/xdit-sidecar", "/run/xdit-sidecar"]
    # A service has no such variable, but its account may have a login's directory.
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 123456)
    assert looked() == ["/run/user/123456/xdit-sidecar", "/run/xdit-sidecar"]


def test_the_first_daemon_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(RUNTIME_DIR_VARIABLE, raising=False)
    with running_daemon(tmp_path) as host, running_daemon(tmp_path) as own:
        monkeypatch.setattr(endpoints_module, "SYSTEM_DIRECTORY", str(host.runtime_dir))
        base = own.runtime_dir / "base"
        base.mkdir()
        try:
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
            with Client() as client:
                assert client.status().pid == host.pid
                # One's own is preferred as soon as it is there, and the host's when it is gone.
                (base / "xdit-sidecar").symlink_to(own.runtime_dir)
                assert client.status().pid == host.pid, "a session is not given up"
                with Client() as other:
                    assert other.status().pid == own.pid
                    own.process.kill()
                    own.process.wait()
                    assert (own.runtime_dir / "session.sock").exists()
                    with contextlib.suppress(DaemonLost):  # its end may not be noticed yet
                        other.status()
                    assert other.status().pid == host.pid
                    assert other.endpoints.directory == host.runtime_dir
        finally:
            shutil.rmtree(base)


def test_a_second_daemon_in_the_same_directory(daemon: DaemonProcess, tmp_path: Path) -> None:
    other = DaemonProcess(tmp_path)
    other._command[other._command.index("--runtime-dir") + 1] = str(daemon.runtime_dir)
    try:
        with pytest.raises(AssertionError, match=r"serves .* already"):
            other.start()
    finally:
        other.close()
    with daemon.client() as client:
        client.ping()


def test_a_directory_open_to_others(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.runtime_dir.chmod(0o770)
    try:
        with pytest.raises(AssertionError, match="wider than 0700"):
            daemon.start()
    finally:
        daemon.close()
