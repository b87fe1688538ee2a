"""A component that is on one GPU reaches the others from there, not from the file again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import components
import pytest
import torch
from daemon_process import running_daemon
from platforms import REAL_CUDA
from safetensors.torch import save_file
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file
from xdit_sidecar.protocol.errors import Cancelled, InUse
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

TENSORS = {"weight": torch.randn(1 << 20), "bias": torch.arange(7)}
PAYLOAD = sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.fixture
def client(two_gpus: list[str], tmp_path: Path) -> Iterator[Client]:
    with running_daemon(tmp_path, device=",".join(two_gpus)) as daemon, daemon.client() as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ComponentFile]:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    with SafetensorsFile.open(tmp_path / "weights.safetensors") as opened:
        yield ComponentFile(opened, role="vae")


def check(attachment: Attachment, device: str) -> None:
    """It lies there and is whole; then it is released."""
    with attachment:
        assert attachment.device == device
        found = attachment.tensors()
        assert all(torch.equal(found[name].cpu(), TENSORS[name]) for name in TENSORS)
        del found


def evict(client: Client, file: ComponentFile, device: str) -> None:
    """Once its leases have come back."""
    for _ in range(500):
        try:
            return client.evict(file.component.fingerprint, device)
        except InUse:
            time.sleep(0.01)
    raise AssertionError("it stays in use")


def test_a_file_is_read_once_for_all_gpus(
    client: Client, two_gpus: list[str], file: ComponentFile
) -> None:
    for device in two_gpus:
        check(hand_over_file(client, file, device), device)
    assert file.bytes_read == PAYLOAD
    copies = client.status().components
    assert sorted(copy.device for copy in copies) == sorted(two_gpus)
    # The first may go: the second is a copy of its own.
    evict(client, file, two_gpus[0])
    check(hand_over_file(client, file, two_gpus[1]), two_gpus[1])


def test_host_memory_is_no_peer(client: Client, two_gpus: list[str], file: ComponentFile) -> None:
    check(hand_over_file(client, file, "cpu"), "cpu")
    check(hand_over_file(client, file, two_gpus[0]), two_gpus[0])
    assert file.bytes_read == 2 * PAYLOAD


def test_what_one_process_has_attached_is_copied_to_another_gpu(
    client: Client, two_gpus: list[str]
) -> None:
    component = components.describe(TENSORS)
    with client.hand_over(
        component, two_gpus[0], lambda writer: writer.copy_tensors(TENSORS)
    ) as attachment:
        check(client.copy_to(attachment, two_gpus[1]), two_gpus[1])
        # Who is there already is attached.
        check(client.copy_to(attachment, two_gpus[1]), two_gpus[1])


def test_a_copy_can_be_cancelled(client: Client, two_gpus: list[str], file: ComponentFile) -> None:
    hand_over_file(client, file, two_gpus[0]).release()
    with pytest.raises(Cancelled):
        hand_over_file(client, file, two_gpus[1], should_cancel=lambda: True)
    check(hand_over_file(client, file, two_gpus[1]), two_gpus[1])


@pytest.mark.skipif(REAL_CUDA, reason="only the fake driver can be told to fail")
def test_gpus_that_cannot_reach_each_other(
    client: Client, two_gpus: list[str], file: ComponentFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over_file(client, file, two_gpus[0]).release()
    # No way of their own: through the host, but not from the file.
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuCtxEnablePeerAccess=217")
    check(hand_over_file(client, file, two_gpus[1]), two_gpus[1])
    assert file.bytes_read == PAYLOAD
    evict(client, file, two_gpus[1])
    # Whatever else is wrong between them, the file is there.
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemcpyDtoD_v2=1")
    check(hand_over_file(client, file, two_gpus[1]), two_gpus[1])
    assert file.bytes_read == 2 * PAYLOAD
