"""The driver binding: what regions rely on, between unrelated processes.

Against the fake driver, or the real one with XDIT_TEST_REAL_CUDA=1.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_cuda import build
from fake_cuda.peer import Peer, PeerError
from xdit_sidecar.protocol.regions.cuda_driver import (
    LIBRARY_VARIABLE,
    CudaDriver,
    CudaError,
    CudaUnavailable,
)

REAL = os.environ.get("XDIT_TEST_REAL_CUDA") == "1"
MIB = 1 << 20
SIZE = 4 * MIB
CONTEXT = 64 * MIB
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT = 1, 2, 201
ALREADY_MAPPED, INVALID_HANDLE = 208, 400

fake_only = pytest.mark.skipif(REAL, reason="NOT SHOWN on real CUDA: only the fake driver can")
pytestmark = (
    [pytest.mark.allow_leaks("the real driver keeps its device files open for good")]
    if REAL
    else []
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CudaDriver]:
    if not REAL:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv(LIBRARY_VARIABLE, build.fake_libcuda())
        monkeypatch.setenv("FAKE_CUDA_STATE", str(tmp_path / "devices"))
        monkeypatch.setenv("FAKE_CUDA_CONTEXT_BYTES", str(CONTEXT))
    driver = CudaDriver.load()
    yield driver
    driver.release_primary_context(0)


@pytest.fixture
def peer(driver: CudaDriver) -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    with pytest.raises((CudaError, PeerError)) as caught:
        yield
    assert isinstance(caught.value, CudaError | PeerError)
    assert caught.value.code in codes


def test_devices_are_named_as_nvidia_smi_names_them(driver: CudaDriver) -> None:
    uuid = driver.device_uuid(0)
    assert re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid)
    assert driver.ordinal_of(uuid) == 0
    assert driver.device_name(0)
    assert driver.version() >= 11000
    with pytest.raises(CudaUnavailable, match=f"GPU-other is not visible.*sees.*{uuid}"):
        driver.ordinal_of("GPU-other")
    with refused(101):
        driver.device_name(driver.device_count())


@fake_only
def test_devices_keep_their_uuid_when_ordinals_change(
    driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    uuids = [driver.device_uuid(ordinal) for ordinal in range(driver.device_count())]
    assert len(set(uuids)) == 3
    for visible in ("2,0", f"{uuids[2]},{uuids[0]}"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [driver.ordinal_of(uuids[2]), driver.ordinal_of(uuids[0])] == [0, 1]
        with pytest.raises(CudaUnavailable, match="not visible"):
            driver.ordinal_of(uuids[1])


def test_two_processes_read_and_write_the_same_bytes(driver: CudaDriver, peer: Peer) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)
        driver.memset_async(base, 0, SIZE)
        driver.copy_to_device(base + 100, b"from the owner")
        driver.synchronize()
        theirs = peer.call("ipc_open_handle", driver.ipc_get_handle(base))
        assert peer.call("copy_from_device", theirs + 100, 14) == b"from the owner"
        peer.call("copy_to_device", theirs + SIZE - 17, b"from the importer")
        peer.call("synchronize")
        assert driver.copy_from_device(base + SIZE - 17, 17) == b"from the importer"
        peer.call("ipc_close_handle", theirs)
        driver.mem_free(base)


def test_what_may_not_be_exported_or_opened(driver: CudaDriver, peer: Peer) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)
        handle = driver.ipc_get_handle(base)
        theirs = peer.call("ipc_open_handle", handle)
        with refused(INVALID_VALUE):
            peer.call("ipc_get_handle", theirs)
        with refused(INVALID_CONTEXT):
            driver.ipc_open_handle(handle)
        with refused(INVALID_VALUE):
            driver.ipc_close_handle(base)
        peer.call("ipc_close_handle", theirs)
        with refused(INVALID_VALUE):
            peer.call("ipc_close_handle", theirs)
        theirs = peer.call("ipc_open_handle", handle)
        peer.call("ipc_close_handle", theirs)
        driver.mem_free(base)


@fake_only
def test_where_the_fake_is_stricter(driver: CudaDriver, peer: Peer) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)
        with refused(INVALID_VALUE):
            driver.ipc_get_handle(base + 2 * MIB)
        handle = driver.ipc_get_handle(base)
        theirs = peer.call("ipc_open_handle", handle)
        with refused(ALREADY_MAPPED):
            peer.call("ipc_open_handle", handle)
        peer.call("ipc_close_handle", theirs)
        with refused(INVALID_VALUE):
            driver.copy_to_device(base + SIZE - 1, b"ab")
        driver.mem_free(base)
        with refused(INVALID_VALUE):
            driver.mem_free(base)
        with refused(INVALID_HANDLE):
            peer.call("ipc_open_handle", handle)
        small = driver.mem_alloc(MIB)
        with refused(INVALID_VALUE):
            driver.ipc_get_handle(small)
        driver.mem_free(small)


def test_an_importer_may_be_killed(driver: CudaDriver, peer: Peer) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)
        theirs = peer.call("ipc_open_handle", driver.ipc_get_handle(base))
        peer.call("copy_to_device", theirs, b"last words")
        peer.call("synchronize")
        peer.kill()
        assert driver.copy_from_device(base, 10) == b"last words"
        driver.copy_to_device(base, b"still mine")
        with Peer() as second:
            theirs = second.call("ipc_open_handle", driver.ipc_get_handle(base))
            assert second.call("copy_from_device", theirs, 10) == b"still mine"
        driver.mem_free(base)


def test_an_owner_may_be_killed(driver: CudaDriver, peer: Peer) -> None:
    theirs = peer.call("mem_alloc", SIZE)
    peer.call("copy_to_device", theirs, b"legacy")
    peer.call("synchronize")
    handle = peer.call("ipc_get_handle", theirs)
    with driver.context(0):
        mine = driver.ipc_open_handle(handle)
        peer.kill()
        assert driver.copy_from_device(mine, 6) == b"legacy"
        driver.ipc_close_handle(mine)
        if not REAL:  # real CUDA leaves it undefined
            with refused(INVALID_HANDLE):
                driver.ipc_open_handle(handle)


def test_a_thread_needs_a_context(driver: CudaDriver) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)

    def without() -> None:
        attempts: list[Callable[[], object]] = [
            lambda: driver.mem_alloc(SIZE),
            lambda: driver.ipc_get_handle(base),
            lambda: driver.ipc_open_handle(bytes(64)),
            lambda: driver.copy_from_device(base, 1),
            lambda: driver.memset_async(base, 0, 1),
            driver.synchronize,
        ]
        if not REAL:  # which frees without one
            attempts.append(lambda: driver.mem_free(base))
        for attempt in attempts:
            with refused(INVALID_CONTEXT):
                attempt()
        with driver.context(0), driver.context(0):
            driver.copy_to_device(base, b"with")
        with pytest.raises(KeyError), driver.context(0):
            raise KeyError
        with refused(INVALID_CONTEXT):
            driver.mem_alloc(SIZE)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(without).result()
    with driver.context(0):
        assert driver.copy_from_device(base, 4) == b"with"
        driver.mem_free(base)


def test_two_threads_open_and_close_at_once(driver: CudaDriver, peer: Peer) -> None:
    handles = []
    for mark in (b"a", b"b"):
        theirs = peer.call("mem_alloc", SIZE)
        peer.call("copy_to_device", theirs, mark)
        handles.append(peer.call("ipc_get_handle", theirs))
    peer.call("synchronize")
    both = threading.Barrier(2)

    def use(handle: bytes) -> set[bytes]:
        seen = set()
        both.wait()
        for _ in range(150):
            with driver.context(0):
                mine = driver.ipc_open_handle(handle)
                seen.add(driver.copy_from_device(mine, 1))
                driver.synchronize()
                driver.ipc_close_handle(mine)
        return seen

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(use, handles)) == [{b"a"}, {b"b"}]


def test_a_context_in_use_is_not_released(driver: CudaDriver) -> None:
    driver.release_primary_context(0)
    with driver.context(0), pytest.raises(RuntimeError, match="in use by 1 thread"):
        driver.release_primary_context(0)
    driver.release_primary_context(0)
    driver.release_primary_context(0)
    with driver.context(0):
        driver.synchronize()


def test_copies_of_any_buffer(driver: CudaDriver) -> None:
    data = os.urandom(17 * MIB)  # more than one piece
    with driver.context(0):
        first, second = driver.mem_alloc(18 * MIB), driver.mem_alloc(18 * MIB)
        for buffer in (data, bytearray(data), memoryview(data), memoryview(data).cast("I")):
            driver.memset_async(first, 255, 18 * MIB)
            driver.copy_to_device(first, buffer)
            driver.copy_on_device(second, first, 18 * MIB)
            assert driver.copy_from_device(second, len(data) + 1) == data + b"\xff"
        driver.copy_to_device(first, b"")
        assert driver.copy_from_device(first, 0) == b""
        assert driver.is_host_memory(first) != REAL
        with refused(INVALID_VALUE):
            driver.is_host_memory(4096)
        driver.mem_free(first)
        driver.mem_free(second)


def test_a_stream_waits_for_what_another_process_writes(driver: CudaDriver, peer: Peer) -> None:
    assert driver.has_stream_values
    with driver.context(0):
        base, stream = driver.mem_alloc(SIZE), driver.stream_create()
        source = driver.mem_alloc(SIZE)
        driver.memset_async(base, 0, SIZE)
        driver.memset_async(source, 5, SIZE)
        driver.synchronize()
        theirs = peer.call("ipc_open_handle", driver.ipc_get_handle(base))
        there = peer.call("stream_create")
        with ThreadPoolExecutor() as pool:

            def copy_after() -> None:
                with driver.context(0):
                    driver.take_values([base, base + 4], 7, stream)
                    driver.copy_on_device_async(base + 64, source, 3, stream)
                    driver.stream_synchronize(stream)

            waiting = pool.submit(copy_after)
            peer.call("write_value", theirs, 7, there)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            peer.call("write_value", theirs + 4, 7, there)
            waiting.result(10)
        assert driver.copy_from_device(base, 8) == bytes(8), "taken"
        assert driver.copy_from_device(base + 64, 4) == b"\5\5\5\0"
        with refused(INVALID_VALUE):
            driver.write_value(base + 2, 1, stream)
        peer.call("stream_destroy", there)
        peer.call("ipc_close_handle", theirs)
        driver.stream_destroy(stream)
        driver.mem_free(source)
        driver.mem_free(base)


def test_impossible_arguments_never_reach_the_driver(driver: CudaDriver) -> None:
    for attempt in (
        lambda: driver.mem_alloc(0),
        lambda: driver.mem_alloc(-1),
        lambda: driver.copy_from_device(0, -1),
        lambda: driver.copy_on_device(0, 0, -1),
        lambda: driver.memset_async(0, 256, 1),
        lambda: driver.ipc_open_handle(bytes(63)),
    ):
        with pytest.raises(ValueError, match=r"needed, not|byte value|64 bytes, not 63"):
            attempt()


@fake_only
def test_work_is_not_done_before_synchronize(
    driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with driver.context(0), Peer(FAKE_CUDA_ASYNC_MS="1000") as slow:
        base = driver.mem_alloc(SIZE)
        theirs = slow.call("ipc_open_handle", driver.ipc_get_handle(base))
        slow.call("memset_async", theirs, 7, SIZE)
        assert driver.copy_from_device(base, 1) == b"\0"
        slow.call("synchronize")
        assert driver.copy_from_device(base + SIZE - 1, 1) == b"\7"
        monkeypatch.setenv("FAKE_CUDA_ASYNC_MS", "50")
        driver.memset_async(base, 8, SIZE)
        assert driver.copy_from_device(base, 1) == b"\x08", "a copy to the host waits too"
        driver.memset_async(base, 9, SIZE)
        driver.mem_free(base)


def test_out_of_memory(driver: CudaDriver) -> None:
    free, total = driver.memory_info(0)
    with driver.context(0):
        with pytest.raises(CudaError) as caught:
            driver.mem_alloc(total + MIB)
        assert str(caught.value) == "cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)"
        assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
        assert caught.value.call == "cuMemAlloc_v2"
        if not REAL:
            driver.mem_free(driver.mem_alloc(free))
            with refused(OUT_OF_MEMORY):
                driver.mem_alloc(free + 1)


@fake_only
def test_memory_is_accounted_over_all_processes(driver: CudaDriver, peer: Peer) -> None:
    _, total = driver.memory_info(0)
    theirs = peer.call("mem_alloc", 3 * MIB)  # of whole 2 MiB pages
    assert driver.memory_info(0) == (total - 2 * CONTEXT - 4 * MIB, total)
    with driver.context(0):
        mine = driver.ipc_open_handle(peer.call("ipc_get_handle", theirs))
        assert driver.memory_info(0)[0] == total - 2 * CONTEXT - 4 * MIB
        peer.kill()
        assert driver.memory_info(0)[0] == total - CONTEXT - 4 * MIB
        driver.ipc_close_handle(mine)
    assert driver.memory_info(0)[0] == total - CONTEXT
    with pytest.raises(PeerError, match="OUT_OF_MEMORY"), Peer(FAKE_CUDA_MEMORY="1") as full:
        full.call("synchronize")


def test_memory_comes_back_after_a_kill(driver: CudaDriver, peer: Peer) -> None:
    size = 1024 * MIB
    peer.call("mem_alloc", size)
    before, _ = driver.memory_info(0)
    peer.kill()
    deadline = time.monotonic() + 10  # the real driver takes a moment
    while driver.memory_info(0)[0] < before + size and time.monotonic() < deadline:
        time.sleep(0.05)
    assert driver.memory_info(0)[0] >= before + size


@fake_only
def test_injected_failures(
    driver: CudaDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuIpcGetMemHandle=999,cuMemAlloc_v2=2")
    with driver.context(0), refused(OUT_OF_MEMORY):
        driver.mem_alloc(SIZE)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    with Peer(FAKE_CUDA_FAIL_FILE=str(faults)) as peer:
        theirs = peer.call("mem_alloc", SIZE)
        faults.write_text("cuIpcGetMemHandle=700\ncuMemFree_v2=54321\n")
        with refused(700):
            peer.call("ipc_get_handle", theirs)
        with pytest.raises(PeerError, match=r"cuMemFree_v2 failed: unrecognised error \(54321\)"):
            peer.call("mem_free", theirs)
        faults.unlink()
        assert len(peer.call("ipc_get_handle", theirs)) == 64
    faults.write_text("cuCtxPushCurrent_v2=709")
    monkeypatch.setenv("FAKE_CUDA_FAIL_FILE", str(faults))
    with pytest.raises(CudaError, match=r"\(709\)"), driver.context(0):
        pytest.fail("the body ran")
    monkeypatch.delenv("FAKE_CUDA_FAIL_FILE")
    driver.release_primary_context(0)  # nobody is left inside


def test_refusals_never_show_the_handle(driver: CudaDriver, peer: Peer) -> None:
    with driver.context(0):
        base = driver.mem_alloc(SIZE)
        handle = driver.ipc_get_handle(base)
    wrong = [bytes(64)]
    if not REAL:  # the real driver does not look at every byte
        wrong = [handle[:i] + bytes([handle[i] ^ 1]) + handle[i + 1 :] for i in range(64)]
    texts = []
    for attempt in wrong:
        with pytest.raises(PeerError) as refusal:
            peer.call("ipc_open_handle", attempt)
        texts.append(str(refusal.value))
    with driver.context(0), pytest.raises(CudaError) as own:
        driver.ipc_open_handle(handle)
    with pytest.raises(ValueError, match="64 bytes, not 65") as length:
        driver.ipc_open_handle(handle + b"x")
    texts += [str(own.value), repr(own.value), str(length.value)]
    for text in texts:
        assert handle[:8].hex() not in text
        assert repr(handle[:8])[2:-1] not in text
    with driver.context(0):
        driver.mem_free(base)
