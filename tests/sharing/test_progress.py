"""How far a hand-over is: for who fills, who waits and who asks for the status."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import components
import pytest
from daemon_process import DaemonProcess
from platforms import Platform
from rich.console import Console
from weights_files import large_file
from xdit_sidecar.daemon.commands.status import print_status
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client import progress as progress_module
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.errors import Cancelled, DeadlineExceeded, InUse
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out
from xdit_sidecar.protocol.messages import Component
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

MIB = 1 << 20
TOTAL = 4 * MIB
Calls = list[tuple[int, int]]


def make_component(number: int = 0) -> Component:
    return Component(
        fingerprint=f"bytes:{number:064x}",
        role="vae",
        label="slow.safetensors",
        tensors=lay_out([TensorSpec("weight", "U8", [TOTAL])]),
    )


def listen(calls: Calls) -> Callable[[int, int], None]:
    return lambda done, total: calls.append((done, total))


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_REPORT_SECONDS", "_TELL_SECONDS"):
        monkeypatch.setattr(progress_module, name, 0.0)


@pytest.mark.usefixtures("_often")
def test_who_fills_from_a_file_hears_how_far_it_is(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "large.safetensors"
    nbytes = large_file(path, 80)  # enough to go through pinned memory
    calls: Calls = []
    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae")
        hand_over_file(client, file, platform.device, on_progress=listen(calls)).release()
        assert len(calls) > 2
        assert [total for _, total in calls] == [nbytes] * len(calls)
        assert calls == sorted(calls)
        assert calls[-1] == (nbytes, nbytes)
        (copy,) = client.status().components
        assert (copy.state, copy.filled) == ("resident", copy.nbytes)
        calls.clear()
        hand_over_file(client, file, platform.device, on_progress=listen(calls)).release()
        assert not calls, "there was nothing to do"


@pytest.mark.usefixtures("_often")
def test_the_status_shows_how_far_a_fill_is(daemon: DaemonProcess, platform: Platform) -> None:
    shown: list[str] = []

    def fill(writer: RegionWriter) -> None:
        for part in (1, 2):
            writer.progressed(part * TOTAL // 4)
        console = Console(file=io.StringIO(), width=250)
        with daemon.client("other") as other:
            until = time.monotonic() + 10
            while (status := other.status()).components[0].filled < 3 * TOTAL // 4:
                # What could not be said while another report was on its way is said later.
                writer.progressed(0)
                assert time.monotonic() < until, status
            print_status(console, status)
        assert isinstance(console.file, io.StringIO)
        shown.append(console.file.getvalue())

    with daemon.client() as client:
        client.hand_over(make_component(), platform.device, fill).release()
    assert "filling 75 %" in shown[0]


@pytest.mark.usefixtures("_often")
def test_who_waits_hears_too_and_has_patience_while_bytes_come(
    daemon: DaemonProcess, platform: Platform
) -> None:
    component = make_component()
    began = threading.Event()
    calls: Calls = []

    def fill(writer: RegionWriter) -> None:
        began.set()
        for _ in range(8):
            time.sleep(0.25)
            writer.progressed(TOTAL // 8)

    def wait() -> float:
        began.wait(10)
        start = time.monotonic()
        with daemon.client("waiter") as waiter:
            waiter.hand_over(
                component,
                platform.device,
                components.must_not_fill,
                timeout=1.0,
                on_progress=listen(calls),
            ).release()
        return time.monotonic() - start

    with daemon.client("filler") as filler, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(wait)
        # Its own timeout is shorter than the fill, too.
        filler.hand_over(component, platform.device, fill, timeout=1.0).release()
        assert waiting.result() > 1.0
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (TOTAL, TOTAL)


def test_who_waits_for_bytes_that_do_not_come_gives_up(
    daemon: DaemonProcess, platform: Platform
) -> None:
    component = make_component()

    def fill(writer: RegionWriter) -> None:
        writer.progressed(TOTAL // 2)
        with (
            daemon.client("waiter") as waiter,
            pytest.raises(DeadlineExceeded, match="no answer from the daemon within"),
        ):
            waiter.hand_over(component, platform.device, components.must_not_fill, timeout=0.3)

    with daemon.client("filler") as filler:
        filler.hand_over(component, platform.device, fill).release()


def test_a_fill_without_bytes_runs_out_of_time(daemon: DaemonProcess, platform: Platform) -> None:
    def fill(writer: RegionWriter) -> None:
        while True:
            time.sleep(0.05)
            writer.progressed(0)

    with daemon.client() as client:
        with pytest.raises(DeadlineExceeded, match=r"slow.safetensors: not one byte came within"):
            client.hand_over(make_component(), platform.device, fill, timeout=0.3)
        daemon.wait_for_status(lambda status: not status.components)


def test_a_fill_is_cancelled_in_the_middle(
    daemon: DaemonProcess, platform: Platform, tmp_path: Path
) -> None:
    path = tmp_path / "large.safetensors"
    nbytes = large_file(path, 320)  # or all of it is there before anybody looks
    cancelled = threading.Event()
    calls: Calls = []

    def cancel(done: int, total: int) -> None:
        calls.append((done, total))
        cancelled.set()

    with daemon.client() as client, SafetensorsFile.open(path) as opened:
        file = ComponentFile(opened, role="vae")
        with pytest.raises(Cancelled):
            hand_over_file(
                client,
                file,
                platform.device,
                should_cancel=cancelled.is_set,
                on_progress=cancel,
            )
        assert calls[0][0] < nbytes
        daemon.wait_for_status(lambda status: not status.components)


@pytest.mark.usefixtures("_often")
def test_a_report_keeps_nothing_of_the_fill(daemon: DaemonProcess, platform: Platform) -> None:
    def fill(writer: RegionWriter) -> None:
        try:
            raise RuntimeError("its traceback has this frame, and so the writer")
        except RuntimeError:
            writer.progressed(TOTAL)

    with daemon.client() as client:
        client.hand_over(make_component(), platform.device, fill).release()


def test_what_the_callback_raises_ends_the_hand_over(
    daemon: DaemonProcess, platform: Platform
) -> None:
    def interrupt(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    def fill(writer: RegionWriter) -> None:
        writer.progressed(10)

    with daemon.client() as client:
        with pytest.raises(RuntimeError, match=f"10 of {TOTAL}"):
            client.hand_over(make_component(), platform.device, fill, on_progress=interrupt)
        daemon.wait_for_status(lambda status: not status.components)


@pytest.mark.usefixtures("_often")
def test_a_daemon_that_hangs_does_not_slow_a_fill(daemon: DaemonProcess) -> None:
    slowest = 0.0

    def fill(writer: RegionWriter) -> None:
        nonlocal slowest
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for _ in range(300):
                began = time.monotonic()
                writer.progressed(TOTAL // 300)
                slowest = max(slowest, time.monotonic() - began)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)

    with daemon.client() as client:
        client.hand_over(make_component(), "cpu", fill).release()
        client.ping()
    assert slowest < 0.2


@pytest.mark.usefixtures("_often")
def test_a_daemon_that_knows_no_reports_is_asked_once(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refused(_region: str, nbytes: int) -> m.Evict:
        asked.append(nbytes)
        return m.Evict(device="cpu", fingerprint="bytes:" + "f" * 64)

    monkeypatch.setattr(m, "FillProgress", refused)

    def fill(writer: RegionWriter) -> None:
        for _ in range(20):
            time.sleep(0.02)
            writer.progressed(1000)

    with daemon.client() as client:
        client.hand_over(make_component(), "cpu", fill).release()
    assert asked == [1000]


@pytest.mark.usefixtures("_often")
def test_who_does_not_ask_for_progress_gets_one_answer(
    daemon: DaemonProcess, platform: Platform
) -> None:
    component = make_component()
    began = threading.Event()

    def fill(writer: RegionWriter) -> None:
        began.set()
        time.sleep(0.3)
        for _ in range(4):
            writer.progressed(TOTAL // 4)
            time.sleep(0.05)

    def open_fill(client: Client) -> None:
        began.wait(10)
        with pytest.raises(InUse):  # as it is resident by the time of the answer
            client.open_fill(component, platform.device)

    with (
        daemon.client("filler") as filler,
        daemon.client("other") as other,
        ThreadPoolExecutor(1) as thread,
    ):
        waiting = thread.submit(open_fill, other)
        filler.hand_over(component, platform.device, fill).release()
        waiting.result()
