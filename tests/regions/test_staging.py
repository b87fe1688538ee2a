"""Files and host tensors into device memory through pinned memory, and all that can fail then.

Against the fake driver, or the real one with XDIT_TEST_REAL_CUDA=1.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda import build
from fake_cuda.peer import Peer
from hypothesis import given
from hypothesis import strategies as st
from weights_files import memory_file
from xdit_sidecar.protocol.errors import ProbeFailed
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.regions import staging
from xdit_sidecar.protocol.regions.base import MappingBytes
from xdit_sidecar.protocol.regions.cuda_driver import LIBRARY_VARIABLE, CudaDriver, CudaError
from xdit_sidecar.protocol.regions.cuda_ipc import CudaIpcMapping
from xdit_sidecar.protocol.regions.file_parts import Batch, FilePart, plan_batches
from xdit_sidecar.protocol.regions.readers import Read, read_in_parallel
from xdit_sidecar.protocol.regions.views import copy_into, describe_tensors

REAL = os.environ.get("XDIT_TEST_REAL_CUDA") == "1"
MIB = 1 << 20
SIZE = 4 * MIB
BUFFER = 64 << 10
CONTENT = os.urandom(3 * MIB)
# In the file's order, with gaps in the region as alignment makes them; some join, some are empty.
PARTS = [
    FilePart(0, 512, 1000),
    FilePart(1000, 2048, 24),
    FilePart(1024, 2072, 300_000),
    FilePart(301_024, 600_000, 0),
    FilePart(301_024, 700_000, 2 * MIB),
    FilePart(3 * MIB - 7, 0, 7),
]

fake_only = pytest.mark.skipif(REAL, reason="NOT SHOWN on real CUDA: only the fake driver can")
pytestmark = (
    [pytest.mark.allow_leaks("the real driver keeps its device files open for good")]
    if REAL
    else []
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CudaDriver]:
    monkeypatch.setattr(staging, "WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(staging, "BUFFER_BYTES", BUFFER)
    monkeypatch.setattr(staging, "READERS", 4)
    if not REAL:
        monkeypatch.setenv(LIBRARY_VARIABLE, build.fake_libcuda())
        monkeypatch.setenv("FAKE_CUDA_STATE", str(tmp_path / "devices"))
    driver = CudaDriver.load()
    yield driver
    for name in ("FAKE_CUDA_FAIL", "FAKE_CUDA_FAIL_FILE"):
        monkeypatch.delenv(name, raising=False)
    driver.release_primary_context(0)


@pytest.fixture
def region(driver: CudaDriver) -> Iterator[CudaIpcMapping]:
    with Peer() as owner:
        base = owner.call("mem_alloc", SIZE)
        owner.call("memset_async", base, 0, SIZE)
        owner.call("synchronize")
        handle = owner.call("ipc_get_handle", base)
        mapping = CudaIpcMapping(handle, driver.device_uuid(0), SIZE)
        yield mapping
        mapping.close()


@pytest.fixture
def source() -> Iterator[int]:
    descriptor = memory_file(CONTENT)
    yield descriptor
    os.close(descriptor)


def expected() -> bytes:
    memory = bytearray(SIZE)
    for position, offset, length in PARTS:
        memory[offset : offset + length] = CONTENT[position : position + length]
    return bytes(memory)


def assert_nothing_left() -> None:
    assert not [t for t in threading.enumerate() if t.name == "xdit-sidecar-read"]
    if not REAL:
        library = ctypes.CDLL(build.fake_libcuda())
        library.fake_cuda_pinned_bytes.restype = ctypes.c_uint64
        assert (library.fake_cuda_pinned_bytes(), library.fake_cuda_streams()) == (0, 0)


def test_parts_land_where_they_belong(
    region: CudaIpcMapping, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "3")  # a buffer used again too early would show
    done: list[int] = []
    region.read_file_parts(source, PARTS, done.append)
    assert region.read(0, SIZE) == expected()
    assert sum(done) == sum(part.length for part in PARTS)
    assert max(done) <= BUFFER
    assert_nothing_left()
    region.read_file_parts(source, [])
    region.read_file(source, 5, 100, 3)
    assert region.read(100, 3) == CONTENT[5:8]
    with pytest.raises(ProbeFailed):
        region.read_file_parts(source, [FilePart(0, 0, 1), FilePart(0, SIZE, 1)])


@fake_only
def test_a_file_that_is_truncated_under_the_read(
    region: CudaIpcMapping, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "20")  # else all may be read before it is truncated

    def truncate(_nbytes: int) -> None:
        os.ftruncate(source, 200_000)

    with pytest.raises(EOFError, match="bytes too early"):
        region.read_file_parts(source, PARTS, truncate)
    assert_nothing_left()


def test_a_file_that_cannot_be_read(region: CudaIpcMapping, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            region.read_file_parts(directory, PARTS)
    finally:
        os.close(directory)
    assert_nothing_left()


def test_who_gives_up_gets_its_own_error_back(region: CudaIpcMapping, source: int) -> None:
    def give_up(_nbytes: int) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        region.read_file_parts(source, PARTS, give_up)
    assert_nothing_left()


@fake_only
@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"])
def test_a_device_that_fails_in_the_middle(
    region: CudaIpcMapping,
    source: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    faults = tmp_path / "faults"
    monkeypatch.setenv("FAKE_CUDA_FAIL_FILE", str(faults))
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "20")  # else all may be copied before it breaks

    def break_device(_nbytes: int) -> None:
        faults.write_text(f"{call}=719")

    with pytest.raises(CudaError, match=rf"{call} failed: CUDA_ERROR_LAUNCH_FAILED"):
        region.read_file_parts(source, PARTS, break_device)
    assert_nothing_left()


@fake_only
def test_a_thread_that_gets_no_context(
    region: CudaIpcMapping, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuCtxPushCurrent_v2=709")
    with pytest.raises(CudaError, match=r"\(709\)"):
        region.read_file_parts(source, PARTS)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    assert_nothing_left()


@fake_only
@pytest.mark.parametrize("refused", ["cuMemHostAlloc=2", "cuStreamCreate=800"])
def test_without_pinned_memory_it_is_slower_and_says_so_once(
    region: CudaIpcMapping,
    source: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", refused)
    done: list[int] = []
    with caplog.at_level(logging.WARNING):
        region.read_file_parts(source, PARTS, done.append)
    (record,) = caplog.records
    assert "4 of 4 pinned buffers" in record.getMessage()
    assert "pageable memory is used" in record.getMessage()
    assert refused.split("=")[0] in record.getMessage()
    assert region.read(0, SIZE) == expected()
    assert sum(done) == sum(part.length for part in PARTS)
    assert_nothing_left()


@fake_only
def test_less_pinned_memory_than_wanted_is_used(
    region: CudaIpcMapping,
    source: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_PINNED", str(BUFFER))
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "5")  # else one could be done before the others begin
    with caplog.at_level(logging.WARNING):
        region.read_file_parts(source, PARTS)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 4 pinned buffers")
    assert region.read(0, SIZE) == expected()
    assert_nothing_left()


@fake_only
def test_little_is_read_without_pinning(
    region: CudaIpcMapping,
    source: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(staging, "WORTHWHILE_BYTES", SIZE)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemHostAlloc=2")
    region.read_file_parts(source, PARTS)
    assert region.read(0, SIZE) == expected()
    assert not caplog.records


@fake_only
def test_the_fake_refuses_what_it_should(driver: CudaDriver) -> None:
    with driver.context(0):
        base, host, stream = driver.mem_alloc(SIZE), driver.mem_host_alloc(10), 0
        with pytest.raises(CudaError, match=r"INVALID_HANDLE"):
            driver.copy_to_device_async(base, host, 10, stream)
        stream = driver.stream_create()
        with pytest.raises(CudaError, match=r"INVALID_VALUE"):
            driver.copy_to_device_async(base, host, 11, stream)
        driver.copy_to_device_async(base, host, 10, stream)
        driver.copy_to_device_async(base, host, 0, stream)
        driver.stream_synchronize(stream)
        for _ in range(2):
            with contextlib.suppress(CudaError):
                driver.stream_destroy(stream)
                driver.mem_free_host(host)
        with pytest.raises(CudaError, match=r"INVALID_VALUE"):
            driver.mem_free_host(host)
        with pytest.raises(CudaError, match=r"INVALID_HANDLE"):
            driver.stream_synchronize(stream)
        driver.mem_free(base)
    assert_nothing_left()


# --- tensors of the host ---


def host_tensors() -> dict[str, torch.Tensor]:
    """One of many buffers, many of one, some that torch copies, two tied."""
    tensors = {f"small.{i}": torch.randn(11 + i) for i in range(40)}
    tensors["large"] = torch.randn(700, 512)
    tensors["half"] = torch.randn(300, 33).to(torch.bfloat16)
    tensors["every other"] = torch.randn(30, 64)[:, ::2]
    tensors["nothing"] = torch.empty(0, 4)
    tensors["tied"] = tensors["large"]
    return tensors


def content_of(specs: list[TensorSpec], tensors: dict[str, torch.Tensor]) -> bytes:
    memory = bytearray(SIZE)
    for spec in specs:
        flat = tensors[spec.name].contiguous().reshape(-1).view(torch.uint8)
        memory[spec.offset : spec.offset + spec.nbytes] = flat.numpy().tobytes()
    return bytes(memory)


@pytest.mark.parametrize("worthwhile", [1, SIZE], ids=["pinned", "too little to pin"])
def test_tensors_land_where_they_belong(
    region: CudaIpcMapping, monkeypatch: pytest.MonkeyPatch, worthwhile: int
) -> None:
    monkeypatch.setattr(staging, "WORTHWHILE_BYTES", worthwhile)
    monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "3")
    tensors = host_tensors()
    specs = describe_tensors(tensors)
    done: list[int] = []
    copy_into(MappingBytes(region), specs, tensors, done.append)
    region.synchronize()
    assert region.read(0, SIZE) == content_of(specs, tensors)
    assert sum(done) == sum(spec.nbytes for spec in specs)
    assert_nothing_left()


def test_no_more_is_pinned_for_more_bytes(
    region: CudaIpcMapping, driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    alloc = driver.mem_host_alloc

    def count(nbytes: int) -> int:
        pinned.append(nbytes)
        return alloc(nbytes)

    monkeypatch.setattr(driver, "mem_host_alloc", count)
    weight = torch.zeros(3 * MIB, dtype=torch.uint8)
    copy_into(MappingBytes(region), describe_tensors({"w": weight}), {"w": weight})
    assert pinned == [BUFFER] * 4


def test_who_gives_up_on_tensors_gets_its_own_error_back(region: CudaIpcMapping) -> None:
    def give_up(_nbytes: int) -> None:
        raise InterruptedError("enough")

    tensors = host_tensors()
    with pytest.raises(InterruptedError, match="enough"):
        copy_into(MappingBytes(region), describe_tensors(tensors), tensors, give_up)
    assert_nothing_left()


@fake_only
def test_a_device_that_fails_under_tensors(
    region: CudaIpcMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = host_tensors()
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemcpyHtoDAsync_v2=719")
    with pytest.raises(CudaError, match="CUDA_ERROR_LAUNCH_FAILED"):
        copy_into(MappingBytes(region), describe_tensors(tensors), tensors)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    assert_nothing_left()


# --- the parts that need no device ---

numbers = st.integers(0, 40)


@given(st.lists(st.tuples(numbers, numbers, numbers).map(FilePart._make)), st.integers(1, 50))
def test_batches_are_the_same_bytes(parts: list[FilePart], most: int) -> None:
    def spread(some: list[FilePart]) -> list[tuple[int, int]]:
        return [(p + i, o + i) for p, o, length in some for i in range(length)]

    batches = list(plan_batches(parts, most))
    assert spread([part for batch in batches for part in batch]) == spread(parts)
    assert all(1 <= sum(part.length for part in batch) <= most for batch in batches)
    # All but the last are full, else there would be more reads and copies than needed.
    assert all(sum(part.length for part in batch) == most for batch in batches[:-1])


def test_neighbours_are_read_as_one() -> None:
    parts = [FilePart(i * 10, 100 + i * 10, 10) for i in range(5)]
    assert list(plan_batches(parts, 100)) == [[FilePart(0, 100, 50)]]


def test_while_nothing_comes_the_caller_may_give_up() -> None:
    heard: list[int] = []

    def read(_batch: Batch) -> None:
        time.sleep(0.3)

    def listen(nbytes: int) -> None:
        heard.append(nbytes)
        if len(heard) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        read_in_parallel(
            plan_batches([FilePart(0, 0, 100)], 1), lambda: contextlib.nullcontext(read), 2, listen
        )
    assert heard == [0, 0]


class Something:
    """What a reader holds, as it would hold a region."""


def test_an_error_keeps_nothing_alive() -> None:
    def fail() -> weakref.ref[Something]:
        held = Something()

        @contextlib.contextmanager
        def open_reader() -> Iterator[Read]:
            def read(_batch: Batch) -> None:
                assert held
                raise OSError("broken")

            yield read

        with contextlib.suppress(OSError):
            read_in_parallel(
                plan_batches([FilePart(0, 0, 100)], 1), open_reader, 4, lambda _nbytes: None
            )
        return weakref.ref(held)

    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


def test_an_interrupt_waits_for_every_thread() -> None:
    reading = threading.Semaphore(0)

    def read(_batch: Batch) -> None:
        reading.release()
        time.sleep(0.3)

    def interrupt() -> None:
        main = threading.main_thread().ident
        assert main is not None
        reading.acquire(timeout=5)
        signal.pthread_kill(main, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            read_in_parallel(
                plan_batches([FilePart(0, 0, 100)], 1),
                lambda: contextlib.nullcontext(read),
                2,
                lambda _nbytes: None,
            )
        assert not [t for t in threading.enumerate() if t.name == "xdit-sidecar-read"]
    finally:
        interrupter.join()
