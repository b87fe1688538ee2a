"""Order of device work around commit, and regions used from several threads."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import components
import pytest
import torch
from daemon_process import DaemonProcess
from platforms import Platform
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.errors import StillMapped, UnknownDevice
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out
from xdit_sidecar.protocol.messages import Component
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver
from xdit_sidecar.protocol.regions.table import process_regions

MEGABYTES = 64
SLOW = 200  # memsets of the whole region: long after commit would return without waiting


def test_commit_waits_for_what_is_still_being_written(
    daemon: DaemonProcess, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.option == "cpu":
        pytest.skip("host memory has no streams")
    if platform.name == "fake-cuda":
        monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "400")
    nbytes = MEGABYTES * 2**20
    component = Component(
        fingerprint="bytes:" + "5" * 64,
        role="vae",
        label="slow",
        tensors=[TensorSpec("w", "U8", [nbytes])],
    )
    driver = CudaDriver.load()

    def fill(writer: RegionWriter) -> None:
        with driver.context(0):
            for value in range(SLOW if platform.name == "real-cuda" else 2):
                driver.memset_async(writer.mapping.address, value % 100, nbytes)
            driver.memset_async(writer.mapping.address, 123, nbytes)

    with daemon.client("filler") as filler, daemon.client("reader") as reader:
        filled = filler.hand_over(component, platform.device, fill)
        attached = reader.attach(component.fingerprint, platform.device)
        assert attached is not None
        assert attached.mapping.read(nbytes - 4, 4) == b"\x7b" * 4
        attached.release()
        filled.release()


def test_a_callback_that_keeps_a_writable_view_is_refused(
    daemon: DaemonProcess, platform: Platform
) -> None:
    if platform.option != "cpu":
        pytest.skip("the CUDA driver cannot make a region read-only")
    sources = components.random_tensors()
    component = components.describe(sources)
    kept: list[torch.Tensor] = []
    with daemon.client() as client:
        with pytest.raises(StillMapped, match="kept a tensor"):
            client.hand_over(component, "cpu", lambda w: kept.extend(w.tensors().values()))
        assert not client.status().components
        kept[0].fill_(1)  # its memory is still there
        kept.clear()
        client.hand_over(component, "cpu", lambda writer: writer.copy_tensors(sources)).release()


def test_open_and_close_from_two_threads(daemon: DaemonProcess, platform: Platform) -> None:
    sources = components.random_tensors()
    component = components.describe(sources)
    failures: list[BaseException] = []

    def attach_and_read(client, rounds: int) -> None:
        try:
            for _ in range(rounds):
                attachment = client.attach(component.fingerprint, platform.device)
                views = attachment.tensors()
                assert torch.equal(views["scale"].cpu(), sources["scale"])
                del views
                attachment.release()
        except BaseException as error:  # noqa: BLE001  told to the main thread
            failures.append(error)

    with daemon.client() as client:
        client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(sources)
        ).release()
        threads = [threading.Thread(target=attach_and_read, args=(client, 50)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        daemon.wait_for_status(lambda s: not s.components[0].sessions)
        assert len(process_regions) == 0


def test_a_lease_lasts_as_long_as_any_tensor(daemon: DaemonProcess, platform: Platform) -> None:
    sources = components.random_tensors()
    component = components.describe(sources)
    with daemon.client() as client:
        attachment = client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(sources)
        )
        kept = attachment.tensors()["scale"]
        attachment.release()
        gone = weakref.ref(attachment)
        del attachment
        gc.collect()
        assert gone() is None
        assert client.status().components[0].sessions
        assert kept.cpu() == sources["scale"]
        del kept
        daemon.wait_for_status(lambda s: not s.components[0].sessions)


def test_a_refused_call_holds_nothing_of_its_callers(
    daemon: DaemonProcess, platform: Platform
) -> None:
    """Errors carry frames: a kept one would keep tensors, and so leases, until a collection."""
    sources = components.random_tensors()
    component = components.describe(sources)

    def attach_and_fail(client) -> None:
        attachment = client.attach(component.fingerprint, platform.device)
        views = attachment.tensors()
        assert client.attach("file:" + "0" * 64, platform.device) is None
        with contextlib.suppress(UnknownDevice):
            client.attach("file:" + "0" * 64, "GPU-" + "0" * 36)
        attachment.release()
        assert views

    with daemon.client() as client:
        client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(sources)
        ).release()
        daemon.wait_for_status(lambda s: not s.components[0].sessions)
        gc.disable()
        try:
            attach_and_fail(client)
            daemon.wait_for_status(lambda s: not s.components[0].sessions)
        finally:
            gc.enable()


def test_parameters_can_be_views(daemon: DaemonProcess, platform: Platform) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    component = components.describe(state)
    inputs = torch.randn(4, 16)
    expected = module(inputs)
    with daemon.client() as client:
        attachment = client.hand_over(
            component, platform.device, lambda writer: writer.copy_tensors(state)
        )
        module.load_state_dict(attachment.tensors(), assign=True)
        module.requires_grad_(False)
        assert all(attachment.contains(p.data_ptr()) for p in module.parameters())
        where = next(module.parameters()).device
        assert torch.allclose(module(inputs.to(where)).cpu(), expected, atol=1e-5)
        del module
        attachment.release()


def test_specs_of_a_region_do_not_overlap() -> None:
    specs = lay_out([TensorSpec("a", "F32", [3]), TensorSpec("b", "BF16", [5, 7])])
    assert specs[1].offset >= specs[0].offset + specs[0].nbytes
