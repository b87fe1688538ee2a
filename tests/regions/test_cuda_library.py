"""Loading the driver library: what is said when it cannot be used. No GPU needed."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_cuda import build
from xdit_sidecar.protocol.regions.cuda_driver import (
    LIBRARY_VARIABLE,
    CudaDriver,
    CudaUnavailable,
)


def test_a_missing_or_foreign_library_is_explained() -> None:
    with pytest.raises(CudaUnavailable, match=rf"libnone\.so cannot be loaded.*{LIBRARY_VARIABLE}"):
        CudaDriver.load("libnone.so")
    with pytest.raises(CudaUnavailable, match="lacks cuInit"):
        CudaDriver.load("libc.so.6")


def test_a_failed_start_is_explained_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = str(shutil.copy(build.fake_libcuda(), tmp_path / "another.so"))
    with monkeypatch.context() as broken:
        broken.setenv("FAKE_CUDA_FAIL", "cuInit=803")
        with pytest.raises(CudaUnavailable, match=r"SYSTEM_DRIVER_MISMATCH \(803\).*nvidia-smi"):
            CudaDriver.load(library)
        broken.setenv("FAKE_CUDA_FAIL", "")
        broken.setenv("CUDA_VISIBLE_DEVICES", "")
        with pytest.raises(CudaUnavailable, match=r"NO_DEVICE.*CUDA_VISIBLE_DEVICES"):
            CudaDriver.load(library)
    with ThreadPoolExecutor(8) as threads:
        loaded = set(threads.map(lambda _: CudaDriver.load(library), range(8)))
    assert len(loaded) == 1


def test_a_driver_without_the_newer_uuid_call_will_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = tmp_path / "old.so"
    # A symbol by another name is not found.
    content = Path(build.fake_libcuda()).read_bytes()
    library.write_bytes(content.replace(b"cuDeviceGetUuid_v2", b"cuDeviceGetUuid_v9"))
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuDeviceGetUuid_v2=801")
    driver = CudaDriver.load(str(library))
    assert driver.device_uuid(0).startswith("GPU-fa4ec0da-")


def test_a_driver_in_which_streams_wait_for_nothing_will_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert CudaDriver.load(build.fake_libcuda()).has_stream_values
    library = tmp_path / "old.so"
    content = Path(build.fake_libcuda()).read_bytes()
    library.write_bytes(content.replace(b"cuStreamBatchMemOp_v2", b"cuStreamBatchMemOp_v9"))
    driver = CudaDriver.load(str(library))
    assert not driver.has_stream_values
    assert driver.device_count() > 0
