"""A call that is given up ends at once and leaves nothing: no grant, no descriptor, no lease."""

from __future__ import annotations

import os
import signal
import time

import components
import pytest
from daemon_process import DaemonProcess
from platforms import Platform
from processes import ClientProcess
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.errors import DeadlineExceeded
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_stopped_daemon_costs_a_call_its_timeout_and_no_more(daemon: DaemonProcess) -> None:
    component = components.describe(components.random_tensors())
    with daemon.client() as client:
        client.ping()
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                client.ping(timeout=0.3)
            with pytest.raises(DeadlineExceeded):
                client.hand_over(component, "cpu", components.must_not_fill, timeout=0.3)
            assert time.monotonic() - began < 2
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        # What was asked for meanwhile is withdrawn: nobody fills, nobody is waited for.
        daemon.wait_for_status(lambda status: not status.components)
        client.ping()


def test_cancelled_attaches_keep_no_descriptor(daemon: DaemonProcess, platform: Platform) -> None:
    with ClientProcess(daemon.runtime_dir) as filler, daemon.client() as client:
        filler.call("hand_over", device=platform.device)
        component = components.describe(components.random_tensors())
        client.ping()
        before = descriptors()
        for _ in range(30):
            with pytest.raises(DeadlineExceeded):
                client.attach(component.fingerprint, platform.device, timeout=1e-9)
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                with pytest.raises(DeadlineExceeded):
                    client.attach(component.fingerprint, platform.device, timeout=0.005)
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
        daemon.wait_for_status(lambda s: len(s.components[0].sessions) == 1)
        deadline = time.monotonic() + 5
        while descriptors() > before + 3:  # a channel or two
            assert time.monotonic() < deadline, descriptors() - before
            time.sleep(0.05)


def test_a_fill_that_raises_waits_for_its_copies(
    daemon: DaemonProcess, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.name != "fake-cuda":
        pytest.skip("only the fake driver can be told to be slow")
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "300")
    component = components.describe(components.random_tensors())
    driver = CudaDriver.load()

    def fill(writer: RegionWriter) -> None:
        with driver.context(0):
            driver.memset_async(writer.mapping.address, 1, 1 << 20)
        raise RuntimeError("interrupted")

    with daemon.client() as client:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="interrupted"):
            client.hand_over(component, platform.device, fill)
        assert time.monotonic() - began >= 0.3, "the region was given back while written"
        daemon.wait_for_status(lambda status: not status.components)
