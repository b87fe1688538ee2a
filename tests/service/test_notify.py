"""What the daemon tells its service manager, and that the watchdog's pings stop with the loop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from daemon_process import DaemonProcess, running_daemon
from service.blockable_daemon import BLOCKED_SECONDS
from service.notify_socket import NotifySocket, notify_socket
from xdit_sidecar.daemon.notify import Notifier
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out
from xdit_sidecar.protocol.messages import Component

WATCHDOG = 1.0  # seconds


@contextlib.contextmanager
def watched_daemon(
    directory: Path, *options: str, watchdog: float = WATCHDOG, **more: str
) -> Iterator[tuple[DaemonProcess, NotifySocket]]:
    """A started daemon and the socket that it notifies."""
    with notify_socket(directory / "notify") as manager:
        environment = {
            "NOTIFY_SOCKET": manager.address,
            "WATCHDOG_USEC": str(int(watchdog * 1e6)),
            **more,
        }
        daemon = DaemonProcess(directory, *options, environment=environment)
        daemon._command[1:3] = [str(Path(__file__).with_name("blockable_daemon.py"))]
        try:
            yield daemon.start(), manager
        finally:
            daemon.close()


def test_it_is_ready_when_the_broker_answers(tmp_path: Path) -> None:
    with notify_socket(tmp_path / "notify") as manager:
        environment = {"NOTIFY_SOCKET": manager.address}
        daemon = DaemonProcess(tmp_path, environment=environment)
        try:
            with daemon.log_path.open("ab") as log:
                daemon.process = subprocess.Popen(
                    daemon._command, stderr=log, env=daemon._environment
                )
            manager.wait_for("STATUS", "starting")
            manager.wait_for("STATUS", "1 device; 0 components (0 MiB); 0 sessions", 30)
            manager.wait_for("READY", "1")
            with daemon.client() as client:
                client.ping(timeout=1.0)
            assert manager.senders == {daemon.pid}
            daemon.stop()
            manager.wait_for("STOPPING", "1")
        finally:
            daemon.close()


def test_an_abstract_socket(tmp_path: Path) -> None:
    with (
        notify_socket(f"xs-{uuid.uuid4().hex}") as manager,
        running_daemon(tmp_path, environment={"NOTIFY_SOCKET": manager.address}),
    ):
        manager.wait_for("READY", "1")


def test_the_status_tells_of_ranks_and_loads(tmp_path: Path) -> None:
    component = Component(
        fingerprint=f"bytes:{0:064x}",
        role="vae",
        label="slow.safetensors",
        tensors=lay_out([TensorSpec("weight", "U8", [4 << 20])]),
    )
    with watched_daemon(tmp_path, "--ranks", "1") as (daemon, manager):
        manager.wait_for("READY", "1")
        # The rank is a client too; being ready is waited for by nobody but whoever asks.
        manager.wait_for("STATUS", "1 device; 0 components (0 MiB); 1 session; 1 of 1 ranks", 90)
        told: list[str] = []

        def fill(writer: RegionWriter) -> None:
            writer.progressed(2 << 20)
            for _ in range(200):
                writer.progressed(0)  # what could not be said at once is said later
                message = manager.next(0.05)
                if message is not None and message.get("STATUS", "").startswith("loading"):
                    told.append(message["STATUS"])
                    return

        with daemon.client() as client:
            client.hand_over(component, "cpu", fill).release()
        assert told[0].startswith("loading slow.safetensors 50 %; 1 device; 1 component (4 MiB); ")
        manager.wait_for("STATUS", "1 device; 1 component (4 MiB); 1 session; 1 of 1 ranks ready")


def test_what_is_wrong_is_told_and_the_daemon_stays(tmp_path: Path) -> None:
    with watched_daemon(tmp_path, watchdog=30) as (daemon, manager):
        for _ in range(3):
            status = daemon.wait_for_status(lambda s: s.devices[0].keeper_pid is not None)
            os.kill(status.devices[0].keeper_pid, signal.SIGKILL)
            daemon.wait_for_status(
                lambda s, pid=status.devices[0].keeper_pid: s.devices[0].keeper_pid != pid
            )
        message = manager.wait_for("STATUS", "cpu failed: ")
        assert "ended with status" in message["STATUS"]
        assert daemon.process is not None
        assert daemon.process.poll() is None


def test_pings_come_at_half_the_time_and_stop_with_the_loop(tmp_path: Path) -> None:
    with watched_daemon(tmp_path) as (daemon, manager):
        manager.wait_for("WATCHDOG")
        manager.drain()
        began = time.monotonic()
        for _ in range(4):
            manager.wait_for("WATCHDOG", seconds=WATCHDOG)
        assert 4 * WATCHDOG / 2 - 0.4 < time.monotonic() - began < 4 * WATCHDOG
        os.kill(daemon.pid, signal.SIGUSR2)
        time.sleep(0.1)
        manager.drain()
        assert manager.next(BLOCKED_SECONDS - 0.5) is None
        assert psutil.Process(daemon.pid).status() != psutil.STATUS_STOPPED
        manager.wait_for("WATCHDOG", seconds=5)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            manager.drain()
            assert manager.next(2 * WATCHDOG) is None
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        manager.wait_for("WATCHDOG", seconds=5)


def test_a_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    more = {"WATCHDOG_PID": str(os.getpid())}
    with watched_daemon(tmp_path, watchdog=0.2, **more) as (_, manager):
        manager.wait_for("READY")
        time.sleep(1.0)
        assert not [message for message in manager.drain() if "WATCHDOG" in message]


def test_children_do_not_inherit_it(tmp_path: Path) -> None:
    with watched_daemon(tmp_path, WATCHDOG_PID="") as (daemon, _):
        (keeper,) = psutil.Process(daemon.pid).children()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(keeper.environ())


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000", "OTHER": "x"}
    notifier = Notifier.from_environment(environ)
    assert environ == {"OTHER": "x"}
    notifier.ready()
    notifier.start_watchdog()
    notifier.close()


def test_a_manager_that_is_gone_or_does_not_read(tmp_path: Path) -> None:
    gone = Notifier(str(tmp_path / "nowhere"))
    gone.ready()
    gone.close()
    with notify_socket(tmp_path / "notify") as manager:
        notifier = Notifier(manager.address)
        began = time.monotonic()
        for number in range(2000):
            notifier.status(f"{number}")
        assert time.monotonic() - began < 2.0
        notifier.status("a\nREADY=1\n\tb " + "x" * 1000)
        notifier.close()
        assert all(set(message) == {"STATUS"} for message in manager.drain())


def test_a_wrong_configuration_ends_with_2_and_its_reason(tmp_path: Path) -> None:
    with notify_socket(tmp_path / "notify") as manager:
        answer = subprocess.run(
            [sys.executable, "-m", "xdit_sidecar.daemon", "serve", "--ranks", "many"],
            env={**os.environ, "NOTIFY_SOCKET": manager.address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert answer.returncode == 2
        assert answer.stderr == (
            "xdit-sidecar: --ranks = many: write auto or a number from 0 to 64\n"
        )
        assert manager.wait_for("STATUS")["STATUS"] == "failed: " + answer.stderr[14:-1]
        assert not [message for message in manager.drain() if "READY" in message]
