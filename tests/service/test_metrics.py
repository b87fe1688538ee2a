"""Metrics, scraped from real daemons on a unix socket and on a port."""

from __future__ import annotations

import http.client
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from components import describe, random_tensors
from daemon_process import DaemonProcess, running_daemon
from prometheus_client.parser import text_string_to_metric_families
from xdit_sidecar.protocol.errors import SidecarError

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket file."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self.host)


def get(connection: http.client.HTTPConnection, path: str = "/metrics") -> tuple[int, str]:
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def samples(text: str) -> Samples:
    """What Prometheus' own parser makes of it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"xdit_sidecar_{name}", frozenset(labels.items())]


@pytest.fixture
def metrics_daemon(tmp_path: Path) -> Iterator[tuple[DaemonProcess, str]]:
    daemon = DaemonProcess(tmp_path)
    path = str(daemon.runtime_dir / "metrics.sock")
    daemon._command += ["--metrics", f"unix:{path}"]
    try:
        yield daemon.start(), path
    finally:
        daemon.close()


def test_metrics_on_a_socket(metrics_daemon: tuple[DaemonProcess, str]) -> None:
    daemon, path = metrics_daemon
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    tensors = random_tensors()
    with daemon.client() as client:
        component = describe(tensors)
        with client.hand_over(component, "cpu", lambda w: w.copy_tensors(tensors)) as held:
            status, text = get(UnixConnection(path))
            assert status == 200
            found = samples(text)
            labels = {"device": "cpu", "role": "vae"}
            assert value(found, "components", state="resident", **labels) == 1
            assert value(found, "component_bytes", state="resident", **labels) == held.nbytes
            assert value(found, "leases", **labels) == 1
            assert value(found, "sessions") == 1
        with pytest.raises(SidecarError):
            client.evict("bytes:" + "0" * 64, "cpu")
        found = samples(get(UnixConnection(path))[1])
    assert value(found, "device_state", device="cpu", state="ready") == 1
    assert value(found, "device_state", device="cpu", state="failed") == 0
    assert value(found, "request_seconds_count", kind="hand-over", outcome="ok") == 1
    assert value(found, "request_seconds_sum", kind="hand-over", outcome="ok") > 0
    assert value(found, "request_seconds_count", kind="evict", outcome="unknown-component") == 1
    assert value(found, "device_regions_bytes", device="cpu") > 0
    # What peers say of themselves and of their files is not in it.
    assert "test.safetensors" not in text
    assert daemon.stop() == 0
    assert not os.path.exists(path)


def test_metrics_on_a_port(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running_daemon(tmp_path, "--metrics", f"127.0.0.1:{port}") as daemon:
        status, text = get(http.client.HTTPConnection("127.0.0.1", port, timeout=10))
        assert status == 200
        assert value(samples(text), "device_state", device="cpu", state="ready") == 1
        assert get(http.client.HTTPConnection("127.0.0.1", port, timeout=10), "/")[0] == 404
        daemon.wait_for_log(f'metrics-served address="127.0.0.1:{port}"')


def test_by_default_nothing_listens(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert "metrics-served" not in daemon.log
        found = Path(f"/proc/{daemon.pid}/net/tcp").read_text()
        ours = {
            os.readlink(entry)
            for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()
            if os.path.lexists(entry)
        }
        listening = [line.split()[9] for line in found.splitlines()[1:] if line.split()[3] == "0A"]
        assert not [inode for inode in listening if f"socket:[{inode}]" in ours]


def test_bad_requests_cost_nobody_else(metrics_daemon: tuple[DaemonProcess, str]) -> None:
    daemon, path = metrics_daemon
    silent = [UnixConnection(path) for _ in range(20)]  # more than are answered at once
    for connection in silent:
        connection.connect()
    with daemon.client() as client:
        began = time.monotonic()
        client.ping()
        assert time.monotonic() - began < 1.0
    for connection in silent:
        connection.close()
    for request in (b"x" * 20_000, b"\r\n\r\n", b"GET\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(path)
            try:
                raw.sendall(request)
                assert b"200 OK" not in raw.recv(4096)
            except ConnectionError:
                pass
    assert get(UnixConnection(path))[0] == 200
    assert "Traceback" not in daemon.log


def test_a_socket_that_somebody_serves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with running_daemon(tmp_path, "--metrics", f"unix:{path}"):
        other = DaemonProcess(tmp_path, "--metrics", f"unix:{path}")
        try:
            with pytest.raises(AssertionError, match="somebody serves"):
                other.start()
        finally:
            other.close()
        assert get(UnixConnection(str(path)))[0] == 200
    # One that a killed daemon left behind is taken over; a file is not.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with running_daemon(tmp_path, "--metrics", f"unix:{path}"):
        assert get(UnixConnection(str(path)))[0] == 200
    path.write_text("precious")
    third = DaemonProcess(tmp_path, "--metrics", f"unix:{path}")
    try:
        with pytest.raises(AssertionError, match="is there and no socket"):
            third.start()
    finally:
        third.close()
    assert path.read_text() == "precious"
