"""Every kind of failure, provoked for real."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import components
import pytest
from daemon_process import DaemonProcess, running_daemon
from health_command import health_check
from platforms import Platform, make_platform
from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.endpoints import resolve_runtime_dir
from xdit_sidecar.protocol.health.regions import check_memory
from xdit_sidecar.protocol.health.visit import MemoryCost, Visit
from xdit_sidecar.protocol.version import ProtocolVersion, encode_preamble

NEXT_MAJOR = ProtocolVersion(2, 0)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A private directory whose path fits into a socket address."""
    with tempfile.TemporaryDirectory(prefix="xs-", dir="/tmp") as name:
        yield Path(name)


# --- no daemon, or another one


def test_no_daemon_ends_with_3(short_directory: Path) -> None:
    for directory in (short_directory, short_directory / "missing"):
        answer = health_check(directory)
        assert answer.code == 3
        assert answer.check("daemon")["status"] == "fail"
        assert "xdit-sidecar serve" in answer.check("daemon")["fix"]
        assert answer.check("region")["status"] == "skip"
    assert health_check(short_directory, "--wait", "ready", "--timeout", "0.5").code == 3


def test_a_socket_that_nobody_listens_on_is_no_daemon(short_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_directory / "session.sock"))
    assert health_check(short_directory).code == 3


@contextlib.contextmanager
def listening(directory: Path, *sent: bytes) -> Iterator[None]:
    """Something that listens where a daemon would, and sends this to the first who connects."""
    sockets = []
    for name in ("session", "control", "bulk"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(directory / f"{name}.sock"))
        (directory / f"{name}.sock").chmod(0o600)
        sock.listen(4)
        sockets.append(sock)
    sockets[0].settimeout(30)

    def serve() -> None:
        connection, _ = sockets[0].accept()
        with connection:
            for data in sent:
                connection.sendall(data)
            connection.settimeout(30)
            while connection.recv(4096):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for sock in sockets:
            sock.close()


def test_another_major_version_is_told(short_directory: Path) -> None:
    text = "the daemon speaks protocol 2.0, this client 1.0: the client is too old"
    refusal = codec.encode(m.Refused("version", text))
    frame = len(refusal).to_bytes(4, "big") + refusal
    with listening(short_directory, encode_preamble(NEXT_MAJOR), frame):
        answer = health_check(short_directory)
    assert answer.code == 1
    assert answer.named("fail") == ["version"]
    assert text in answer.check("version")["detail"]
    assert answer.check("region")["status"] == "skip"


def test_something_else_that_listens_is_told(short_directory: Path) -> None:
    with listening(short_directory, b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        answer = health_check(short_directory)
    assert answer.code == 1
    assert "something else listens" in answer.check("daemon")["detail"]


def test_a_daemon_that_hangs_fails_in_time(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            answer = health_check(daemon.runtime_dir, "--timeout", "2")
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert answer.code == 1
        assert answer.check("daemon")["status"] == "fail"
        assert answer.seconds < 10
        assert health_check(daemon.runtime_dir).code == 0


# --- permissions and peer


def test_wrong_modes_fail(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        directory = daemon.runtime_dir
        for path, wrong, right, name in [
            (directory, 0o755, 0o700, "runtime directory"),
            (directory, 0o711, 0o700, "runtime directory"),
            (directory / "control.sock", 0o666, 0o600, "sockets"),
            (directory / "session.sock", 0o660, 0o600, "sockets"),
        ]:
            path.chmod(wrong)
            answer = health_check(directory)
            path.chmod(right)
            assert answer.code == 1
            assert answer.named("fail") == [name]
            assert f"{wrong:04o}" in answer.check(name)["detail"]
            assert f"chmod {right:o}" in answer.check(name)["fix"]
        assert health_check(directory).code == 0


def test_a_shared_daemon_may_have_wider_modes(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--trust-uid", "65534") as daemon:
        answer = health_check(daemon.runtime_dir)
        assert answer.code == 0
        assert "shared" in answer.check("runtime directory")["detail"]


def test_a_lock_of_another_process_is_told(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        (daemon.runtime_dir / "daemon.lock").write_text(f"{os.getpid()}\n")
        answer = health_check(daemon.runtime_dir)
        assert answer.named("fail") == ["peer"]


# --- keepers and devices


def test_a_stopped_keeper_fails_in_time(daemon: DaemonProcess, platform: Platform) -> None:
    status = daemon.wait_for_status(lambda status: True)
    (keeper,) = (d.keeper_pid for d in status.devices if d.device == platform.device)
    assert keeper is not None
    os.kill(keeper, signal.SIGSTOP)
    try:
        answer = health_check(daemon.runtime_dir, "--timeout", "5")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGCONT)
    assert answer.code == 1
    assert answer.named("fail") == [f"region {platform.device}"]
    assert str(keeper) in answer.check(f"region {platform.device}")["detail"]
    assert answer.check(f"memory {platform.device}")["status"] == "skip"
    assert answer.seconds < 10
    daemon.wait_for_status(lambda status: not status.components)
    assert health_check(daemon.runtime_dir).code == 0


def test_a_keeper_that_cannot_start_is_told(tmp_path: Path) -> None:
    fake = make_platform("fake-cuda", tmp_path)
    broken = {**fake.environment, "FAKE_CUDA_FAIL": "cuDevicePrimaryCtxRetain=2"}
    with running_daemon(tmp_path, device="cuda", environment=broken) as daemon:
        answer = health_check(daemon.runtime_dir, environment=fake.environment)
    assert answer.code == 1
    (name,) = answer.named("fail")
    assert name.startswith("region GPU-")
    assert "failed" in answer.check(name)["detail"]
    assert "CUDA_ERROR_OUT_OF_MEMORY" in answer.check(name)["detail"]
    assert answer.check("region cpu")["status"] == "ok"


def test_a_refused_handle_is_told_without_the_handle(tmp_path: Path) -> None:
    fake = make_platform("fake-cuda", tmp_path)
    refusing = {**fake.environment, "FAKE_CUDA_FAIL": "cuIpcOpenMemHandle_v2=999"}
    with running_daemon(tmp_path, device="cuda", environment=fake.environment) as daemon:
        answer = health_check(daemon.runtime_dir, environment=refusing)
        assert answer.code == 1
        (name,) = answer.named("fail")
        assert "CUDA_ERROR_UNKNOWN" in answer.check(name)["detail"]
        assert "--ipc=host" in answer.check(name)["fix"]
        assert health_check(daemon.runtime_dir, environment=fake.environment).code == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("cuMemAlloc_v2=2", "needs 2097152 bytes"),
        ("cuIpcGetMemHandle=801", "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuMemcpyDtoH_v2=719", "the keeper of GPU-"),
    ],
)
def test_a_driver_that_fails_in_the_keeper_is_told(tmp_path: Path, call: str, said: str) -> None:
    fake = make_platform("fake-cuda", tmp_path)
    failing = tmp_path / "fail"
    environment = {**fake.environment, "FAKE_CUDA_FAIL_FILE": str(failing)}
    with running_daemon(tmp_path, device="cuda", environment=environment) as daemon:
        failing.write_text(call)
        answer = health_check(daemon.runtime_dir, environment=fake.environment)
        failing.unlink()
    assert answer.code == 1
    (name,) = answer.named("fail")
    assert said in answer.check(name)["detail"]


def test_memory_that_does_not_come_back_is_told(short_directory: Path) -> None:
    # A keeper that cannot free ends, and its memory with it, so no real run can show this.
    endpoints = resolve_runtime_dir(short_directory)
    with Client(short_directory) as client:
        visit = Visit(endpoints, client, Deadline(1.0))
    visit.memory["GPU-0"] = MemoryCost(2 << 20, 100 << 20, 98 << 20, 98 << 20, 0)
    found = check_memory(visit, "GPU-0")
    assert (found.status, found.fix != "") == ("warn", True)
    assert "2 MiB did not come back" in found.detail
    visit.memory["GPU-0"] = MemoryCost(2 << 20, 100 << 20, 98 << 20, 100 << 20, 0)
    assert check_memory(visit, "GPU-0").status == "ok"


# --- memory


def test_a_full_device_is_told(platform: Platform, tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--reserve", "100T", device=platform.option) as daemon:
        answer = health_check(daemon.runtime_dir)
        assert answer.code == 1
        assert f"region {platform.device}" in answer.named("fail")
        assert "can be had" in answer.check(f"region {platform.device}")["detail"]
        assert "--reserve" in answer.check(f"region {platform.device}")["fix"]


@pytest.mark.parametrize("leased", [True, False])
def test_a_full_budget_is_probed_without_evicting(
    platform: Platform, tmp_path: Path, leased: bool
) -> None:
    sources = components.random_tensors()
    component = components.describe(sources, "vae.safetensors")
    with (
        running_daemon(tmp_path, "--budget", "2M", device=platform.option) as daemon,
        daemon.client("holder") as client,
    ):
        held = client.hand_over(component, platform.device, lambda w: w.copy_tensors(sources))
        if not leased:
            held.release()
            daemon.wait_for_status(lambda status: not any(c.sessions for c in status.components))
        assert health_check(daemon.runtime_dir).code == 0
        (kept,) = daemon.wait_for_status(lambda status: True).components
        assert kept.label == "vae.safetensors"
        held.release()


def test_orphaned_bytes_are_told(daemon: DaemonProcess, platform: Platform) -> None:
    sources = components.random_tensors()
    with daemon.client("holder") as client:
        held = client.hand_over(
            components.describe(sources), platform.device, lambda w: w.copy_tensors(sources)
        )
        keepers = {d.device: d.keeper_pid for d in client.status().devices}
        os.kill(keepers[platform.device] or 0, signal.SIGKILL)
        assert held.orphaned.wait(10)
        answer = health_check(daemon.runtime_dir, "--wait", "ready")
        # Clients work on, and the device has a new keeper: a warning.
        assert answer.code == 0
        assert answer.named("warn") == ["sessions and leases"]
        assert "2 MiB" in answer.check("sessions and leases")["detail"]
        assert "orphaned" in answer.check("sessions and leases")["detail"]
        held.release()
    daemon.wait_for_status(lambda status: not status.components)
    assert not health_check(daemon.runtime_dir).named("warn")
