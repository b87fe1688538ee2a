"""Sharing is real: counted by the kernel, over processes, in host memory."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import components
import psutil
import pytest
from daemon_process import DaemonProcess, running_daemon
from platforms import Platform
from processes import ClientProcess
from weights_files import large_file
from xdit_sidecar.protocol.client.session import ClientSession

MEBIBYTES = 128
# What else grows meanwhile (heaps of two clients, messages): a tenth of the component, 13 MB. The
# pages of the region itself: its end is rounded up to a page.
GROWTH_TOLERANCE = 0.1
SHARE_TOLERANCE = 0.01
REGION_NAME = "memfd:xdit-sidecar"


@pytest.fixture
def host_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, device="cpu") as running:
        yield running


def daemon_pids(daemon: DaemonProcess) -> list[int]:
    with daemon.client() as client:
        status = client.status()
    return [status.pid, *(d.keeper_pid for d in status.devices if d.keeper_pid is not None)]


def proportional_share(pids: Sequence[int]) -> int:
    """PSS of all that these processes have, in bytes."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)


def region_share(pids: Sequence[int]) -> int:
    """PSS of the regions that these processes map, in bytes."""
    return sum(
        found.pss
        for pid in pids
        for found in psutil.Process(pid).memory_maps(grouped=False)
        if REGION_NAME in found.path
    )


def test_before_commit_each_side_sees_what_the_other_writes(
    daemon: DaemonProcess, platform: Platform
) -> None:
    component = components.describe(components.random_tensors())
    with daemon.client() as client, client.open_fill(component, platform.device) as fill:
        assert fill.writer is not None
        ours, theirs = os.urandom(64), os.urandom(64)
        fill.writer.write(4096, ours)
        fill.writer.mapping.synchronize()
        assert fill.probe("keeper", offset=4096, length=64) == ours
        fill.probe("keeper", offset=8192, length=64, write=theirs)
        assert fill.writer.mapping.read(8192, 64) == theirs
        assert fill.writer.mapping.read(4096, 64) == ours


def test_daemon_and_two_clients_have_one_copy(host_daemon: DaemonProcess, tmp_path: Path) -> None:
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    large_file(small, 2)
    payload = large_file(large, MEBIBYTES)
    with (
        ClientProcess(host_daemon.runtime_dir, "first") as first,
        ClientProcess(host_daemon.runtime_dir, "second") as second,
    ):
        clients = [first, second]
        for client in clients:
            # The first use imports and allocates a lot that has nothing to do with the weights.
            client.call("hand_over_file", device="cpu", path=str(small))
            client.call("release")
        host_daemon.wait_for_status(lambda s: not any(c.sessions for c in s.components))
        pids = [*daemon_pids(host_daemon), first.pid, second.pid]
        before = proportional_share(pids)
        assert region_share(pids) == 0

        for client in clients:
            client.send("hand_over_file", device="cpu", path=str(large))
        reads = sorted(client.receive() for client in clients)  # type: ignore[type-var]
        assert reads == [0, payload]
        assert region_share(pids) == pytest.approx(payload, rel=SHARE_TOLERANCE)
        grown = proportional_share(pids) - before
        assert grown == pytest.approx(payload, rel=GROWTH_TOLERANCE)

        # The measurement would notice a second copy.
        second.call("copy_privately")
        grown = proportional_share(pids) - before
        assert grown == pytest.approx(2 * payload, rel=GROWTH_TOLERANCE)


def test_a_tensor_of_a_committed_component_cannot_be_written(
    host_daemon: DaemonProcess, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    large_file(path, 2)
    with ClientProcess(host_daemon.runtime_dir, "writer") as writer:
        writer.call("hand_over_file", device="cpu", path=str(path))
        writer.send("write_to_map")
        with pytest.raises(AssertionError, match="the client process ended"):
            writer.receive()
        assert writer.wait() == -signal.SIGSEGV


def keepers_region(daemon: DaemonProcess) -> Path:
    """The keeper's own descriptor of its only region, in /proc."""
    with daemon.client() as client:
        (device,) = client.status().devices
    (found,) = [
        entry
        for entry in Path(f"/proc/{device.keeper_pid}/fd").iterdir()
        if REGION_NAME in os.readlink(entry)
    ]
    return found


def must_refuse_writes(descriptor: int, nbytes: int) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match=r"Operation not permitted|Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    for size in (0, 2 * nbytes):
        with pytest.raises(OSError, match=r"Operation not permitted|Invalid argument"):
            os.ftruncate(descriptor, size)


def test_a_sealed_region_refuses_every_way_to_write(
    host_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = components.random_tensors()
    received = []
    take = ClientSession.take_descriptor

    def remember(session: ClientSession, *arguments: object) -> int:
        descriptor = take(session, *arguments)  # type: ignore[arg-type]
        received.append(os.dup(descriptor))
        return descriptor

    monkeypatch.setattr(ClientSession, "take_descriptor", remember)
    with host_daemon.client() as client:
        attachment = client.hand_over(
            components.describe(tensors), "cpu", lambda writer: writer.copy_tensors(tensors)
        )
        expected = attachment.mapping.read(0, attachment.nbytes)
        # The one that came for filling was writable, the one of the attachment never was.
        assert len(received) == 2
        for descriptor in received:
            must_refuse_writes(descriptor, attachment.nbytes)
            os.close(descriptor)
        # Not even the owner, or root through /proc, can.
        descriptor = os.open(keepers_region(host_daemon), os.O_RDWR)
        must_refuse_writes(descriptor, attachment.nbytes)
        os.close(descriptor)
        assert attachment.mapping.read(0, attachment.nbytes) == expected
        attachment.release()


def test_the_memory_goes_with_the_component(host_daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    payload = large_file(path, 32)
    with ClientProcess(host_daemon.runtime_dir) as client:
        client.call("hand_over_file", device="cpu", path=str(path))
        behind = os.stat(keepers_region(host_daemon)).st_blocks * 512
        assert behind == pytest.approx(payload, rel=SHARE_TOLERANCE)
        client.call("release")
        status = host_daemon.wait_for_status(lambda s: not s.components[0].sessions)
        fingerprint = status.components[0].fingerprint
        with host_daemon.client() as other:
            other.evict(fingerprint, "cpu")
            host_daemon.wait_for_status(lambda s: not s.components)
        assert region_share([*daemon_pids(host_daemon), client.pid]) == 0
        with pytest.raises(ValueError, match="not enough values"):
            keepers_region(host_daemon)
