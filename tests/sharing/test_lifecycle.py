"""Who dies when, and what remains: clients, fillers, keepers, the daemon."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import components
import pytest
from daemon_process import DaemonProcess, running_daemon
from platforms import Platform
from processes import ClientProcess
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import (
    DaemonAbsent,
    DaemonLost,
    InUse,
    OutOfMemory,
    SidecarError,
)

FAST_SECONDS = 2.0  # "at once", with room for a busy machine


def leases(status: m.Status) -> int:
    return sum(len(component.sessions) for component in status.components)


def keeper_pid(daemon: DaemonProcess, device: str) -> int:
    with daemon.client() as client:
        (found,) = [d.keeper_pid for d in client.status().devices if d.device == device]
    assert found
    return found


@pytest.fixture
def two(daemon: DaemonProcess) -> Iterator[tuple[ClientProcess, ClientProcess]]:
    with (
        ClientProcess(daemon.runtime_dir, "one") as one,
        ClientProcess(daemon.runtime_dir, "two") as two,
    ):
        yield one, two


def test_two_at_once_end_with_one_copy(
    daemon: DaemonProcess, platform: Platform, two: tuple[ClientProcess, ClientProcess]
) -> None:
    for client in two:
        client.send("hand_over", device=platform.device, pause=0.3)
    filled = [client.receive() for client in two]
    assert sorted(map(bool, filled)) == [False, True]
    assert all(client.call("check") for client in two)
    status = daemon.wait_for_status(lambda status: leases(status) == 2)
    (copy,) = status.components
    assert copy.nbytes == sum(d.regions for d in status.devices)


def test_a_filler_that_dies_leaves_nothing_and_a_waiter_takes_over(
    daemon: DaemonProcess, platform: Platform, two: tuple[ClientProcess, ClientProcess]
) -> None:
    filler, waiter = two
    filler.call("begin_fill", device=platform.device)
    waiter.send("hand_over", device=platform.device)
    daemon.wait_for_status(lambda s: s.components and s.components[0].state == "filling")
    time.sleep(0.2)  # the waiter asks
    filler.kill()
    assert waiter.receive() is True
    assert waiter.call("check")
    status = daemon.wait_for_status(lambda s: len(s.components) == 1)
    assert sum(d.regions for d in status.devices) == status.components[0].nbytes


def test_killing_a_client_ends_its_leases_and_keeps_the_component(
    daemon: DaemonProcess, platform: Platform, two: tuple[ClientProcess, ClientProcess]
) -> None:
    for client in two:
        client.call("hand_over", device=platform.device)
    assert leases(daemon.wait_for_status(lambda s: True)) == 2
    two[0].kill()
    daemon.wait_for_status(lambda s: leases(s) == 1, FAST_SECONDS)
    assert two[1].call("check")
    two[1].kill()
    status = daemon.wait_for_status(lambda s: leases(s) == 0, FAST_SECONDS)
    assert [c.state for c in status.components] == ["resident"]
    with ClientProcess(daemon.runtime_dir) as later:
        assert later.call("hand_over", device=platform.device) is False
        assert later.call("check")


def test_a_stopped_client_keeps_its_lease(
    daemon: DaemonProcess, platform: Platform, two: tuple[ClientProcess, ClientProcess]
) -> None:
    two[0].call("hand_over", device=platform.device)
    two[0].kill(signal.SIGSTOP)
    with daemon.client() as client:
        (copy,) = client.status().components
        with pytest.raises(InUse, match="is used by s"):
            client.evict(copy.fingerprint, platform.device)
        two[0].kill(signal.SIGCONT)
        assert two[0].call("check")
        two[0].kill()
        daemon.wait_for_status(lambda s: leases(s) == 0, FAST_SECONDS)
        client.evict(copy.fingerprint, platform.device)
        status = client.status()
    assert not status.components
    assert not sum(d.regions for d in status.devices)


def test_the_orphaned_state_from_detection_to_one_copy(
    daemon: DaemonProcess, platform: Platform, two: tuple[ClientProcess, ClientProcess]
) -> None:
    for client in two:
        client.call("hand_over", device=platform.device)
    os.kill(keeper_pid(daemon, platform.device), signal.SIGKILL)
    assert all(client.call("orphaned") for client in two)
    # Clients keep working on the old bytes, which status counts.
    assert all(client.call("check") for client in two)
    status = daemon.wait_for_status(lambda s: any(d.orphaned for d in s.devices))
    (orphan,) = status.components
    assert (orphan.state, len(orphan.sessions)) == ("orphaned", 2)
    daemon.wait_for_status(lambda s: all(d.state == "ready" for d in s.devices))
    # One refills a new region from its mapping, the other attaches; then the orphan is gone.
    two[0].call("renew")
    status = daemon.wait_for_status(lambda s: len(s.components) == 2)
    assert sorted(c.state for c in status.components) == ["orphaned", "resident"]
    two[1].call("renew")
    status = daemon.wait_for_status(lambda s: len(s.components) == 1 and leases(s) == 2)
    assert status.components[0].state == "resident"
    assert not any(d.orphaned for d in status.devices)
    assert all(client.call("check") for client in two)


def test_a_keeper_that_hangs_is_replaced(tmp_path: Path, platform: Platform) -> None:
    with running_daemon(tmp_path, device=platform.option) as daemon:
        os.kill(keeper_pid(daemon, platform.device), signal.SIGSTOP)
        with daemon.client() as client:
            tensors = components.random_tensors()
            attachment = client.hand_over(
                components.describe(tensors),
                platform.device,
                lambda writer: writer.copy_tensors(tensors),
                timeout=60,
            )
            attachment.release()
        assert "did not answer" in daemon.wait_for_log("keeper-lost")


def test_unleased_components_make_room_and_leased_ones_do_not(
    tmp_path: Path, platform: Platform
) -> None:
    budget = 3 * 2**20  # one region of 2 MiB and no second one
    with (
        running_daemon(tmp_path, "--budget", str(budget), device=platform.option) as daemon,
        ClientProcess(daemon.runtime_dir) as first,
        ClientProcess(daemon.runtime_dir) as second,
    ):
        first.call("hand_over", device=platform.device, seed=1)
        with pytest.raises(AssertionError, match=r"OutOfMemory: .* used by s"):
            second.call("hand_over", device=platform.device, seed=2)
        first.kill()
        daemon.wait_for_status(lambda s: leases(s) == 0)
        assert second.call("hand_over", device=platform.device, seed=2) is True
        assert second.call("check", seed=2)


def test_the_reserve_stays_free(tmp_path: Path, platform: Platform) -> None:
    component = components.describe(components.random_tensors())
    with (
        running_daemon(tmp_path, "--reserve", "100T", device=platform.option) as daemon,
        daemon.client() as client,
        pytest.raises(OutOfMemory, match="Options: an fp8 file"),
    ):
        client.hand_over(component, platform.device, components.must_not_fill)


def test_idle_components_go(tmp_path: Path, platform: Platform) -> None:
    with (
        running_daemon(tmp_path, "--idle", "1", device=platform.option) as daemon,
        ClientProcess(daemon.runtime_dir) as client,
    ):
        client.call("hand_over", device=platform.device)
        time.sleep(2.5)
        assert leases(daemon.wait_for_status(lambda s: True)) == 1
        client.call("release")
        daemon.wait_for_status(lambda s: not s.components)


def test_a_restarted_daemon_is_found_again(daemon: DaemonProcess, platform: Platform) -> None:
    with ClientProcess(daemon.runtime_dir) as client:
        client.call("hand_over", device=platform.device)
        before = client.call("ping")
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait()
        assert client.call("check")  # what is mapped stays
        with pytest.raises(AssertionError, match=r"DaemonLost|DaemonAbsent"):
            client.call("ping")
        daemon.start()
        assert client.call("ping") != before
        client.call("renew")
        assert client.call("check")


def test_nothing_remains_after_the_end(daemon: DaemonProcess, platform: Platform) -> None:
    with ClientProcess(daemon.runtime_dir) as client:
        client.call("hand_over", device=platform.device)
        keeper = keeper_pid(daemon, platform.device)
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10
        assert not Path(f"/proc/{keeper}").exists()
        assert not list(daemon.runtime_dir.iterdir())
        with pytest.raises(AssertionError, match=r"DaemonLost|DaemonAbsent"):
            client.call("ping")


def test_children_die_with_the_broker(daemon: DaemonProcess, platform: Platform) -> None:
    keeper = keeper_pid(daemon, platform.device)
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    deadline = time.monotonic() + FAST_SECONDS
    while Path(f"/proc/{keeper}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with daemon.client() as client, pytest.raises(DaemonAbsent, match="xdit-sidecar serve"):
        client.ping()


def test_a_wait_can_be_cancelled_and_the_lease_is_not_given(
    daemon: DaemonProcess, platform: Platform
) -> None:
    with ClientProcess(daemon.runtime_dir) as filler, daemon.client() as waiter:
        filler.call("begin_fill", device=platform.device)
        component = components.describe(components.random_tensors())
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > 10

        with pytest.raises(SidecarError, match="cancelled"):
            waiter.hand_over(
                component, platform.device, components.must_not_fill, should_cancel=stop
            )
        with pytest.raises(SidecarError, match=r"within 0\.3 s"):
            waiter.hand_over(component, platform.device, components.must_not_fill, timeout=0.3)
        filler.kill()
        # Nobody waits any more, so nobody becomes the filler and nothing is left.
        daemon.wait_for_status(lambda s: not s.components)


def test_a_call_in_flight_ends_when_the_daemon_dies(
    daemon: DaemonProcess, platform: Platform
) -> None:
    with ClientProcess(daemon.runtime_dir) as filler, daemon.client() as waiter:
        filler.call("begin_fill", device=platform.device)
        session = waiter.ping()
        assert session
        component = components.describe(components.random_tensors())
        assert daemon.process is not None
        os.kill(daemon.pid, signal.SIGSTOP)
        os.kill(daemon.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises((DaemonLost, DaemonAbsent)):
            waiter.attach(component.fingerprint, platform.device)
        assert time.monotonic() - began < 3
        daemon.process.wait()


def test_a_keeper_that_cannot_free_is_replaced(tmp_path: Path, platform: Platform) -> None:
    if platform.name != "fake-cuda":
        pytest.skip("only the fake driver can be told to fail")
    faults = tmp_path / "faults"
    faults.write_text("")
    environment = {"FAKE_CUDA_FAIL_FILE": str(faults)}
    tensors = components.random_tensors()
    component = components.describe(tensors)
    with (
        running_daemon(tmp_path, device="cuda", environment=environment) as daemon,
        daemon.client() as client,
    ):
        client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(tensors)
        ).release()
        daemon.wait_for_status(lambda s: not s.components[0].sessions)
        faults.write_text("cuMemFree_v2=700")
        client.evict(component.fingerprint, platform.device)  # gone with the process
        assert "ended with status 1" in daemon.wait_for_log("keeper-lost")
        assert "cuMemFree_v2 failed" in daemon.log
        faults.write_text("")
        daemon.wait_for_status(lambda s: all(d.state == "ready" for d in s.devices))
        client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(tensors)
        ).release()
