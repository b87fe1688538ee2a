"""The CUDA driver API, as far as regions need it: allocate, export, open, copy.

Driver only, through ctypes: the keeper must have no torch to crash on, and inside ComfyUI the
allocations must not come from torch's pool, which cannot be exported under
``backend:cudaMallocAsync``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from .cuda_library import (
    IPC_HANDLE_BYTES,
    LIBRARY_VARIABLE,
    STREAM_VALUE_CALLS,
    UUID_CALLS,
    Context,
    CudaUnavailable,
    Device,
    DevicePointer,
    Function,
    HostPointer,
    Int,
    IpcHandle,
    Size,
    Stream,
    UInt,
    Uuid,
    ValueOperation,
    load_functions,
)

__all__ = ["IPC_HANDLE_BYTES", "LIBRARY_VARIABLE", "CudaDriver", "CudaError", "CudaUnavailable"]

_DEFAULT_LIBRARY = "libcuda.so.1"
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
_ATTRIBUTE_MEMORY_TYPE = 2
_MEMORY_TYPE_HOST = 1
_HOST_ALLOC_PORTABLE = 1
_STREAM_NON_BLOCKING = 1
_WAIT_UNTIL_EQUAL = 1
_OPERATION_WAIT, _OPERATION_WRITE = 1, 2
_PEER_ACCESS_ALREADY_ENABLED = 704
_PEER_ACCESS_UNSUPPORTED = 217
_NAME_BYTES = 256
# A read-only buffer has no address that ctypes may take, so it is copied in pieces of this size.
_STAGE_BYTES = 16 << 20


class CudaError(Exception):
    """A driver call failed. Never contains an IPC handle: the text may be logged.

    ``code`` is the CUresult, ``name`` its name ("CUDA_ERROR_OUT_OF_MEMORY"), ``call`` the function.
    """

    def __init__(self, code: int, name: str, call: str) -> None:
        super().__init__(f"{call} failed: {name} ({code})")
        self.code = code
        self.name = name
        self.call = call


class _PrimaryContext:
    """Our one hold on a device's primary context, and how many threads are inside it."""

    def __init__(self, device: int, pointer: int) -> None:
        self.device = device
        self.pointer = pointer
        self.users = 0


class CudaDriver:
    """The initialised driver of this process. Safe to use from any thread; ``load`` makes it.

    Pointers are device addresses as ``int``; sizes are bytes. Every method may raise ``CudaError``.
    From ``mem_alloc`` on they need a current context on the calling thread (else error 201):
    ``with driver.context(ordinal): ...``.
    """

    _loaded: ClassVar[dict[str, CudaDriver]] = {}
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, functions: Mapping[str, Function]) -> None:
        self._functions = functions
        self._contexts: dict[int, _PrimaryContext] = {}
        self._contexts_lock = threading.Lock()

    @classmethod
    def load(cls, library: str | None = None) -> CudaDriver:
        """Load the driver library and initialise it, once per process and library.

        ``library`` defaults to the one named by ``XDIT_SIDECAR_LIBCUDA``, else ``libcuda.so.1``.
        Makes no context and uses no device memory. Raises ``CudaUnavailable``; a failure is not
        remembered, so it can be tried again. Never fork afterwards: no call works in the child.
        """
        name = library or os.environ.get(LIBRARY_VARIABLE) or _DEFAULT_LIBRARY
        with cls._loading:
            driver = cls._loaded.get(name)
            if driver is None:
                driver = cls(load_functions(name))
                driver._initialise(name)
                cls._loaded[name] = driver
            return driver

    def _initialise(self, library: str) -> None:
        code = self._functions["cuInit"](0)
        if code:
            raise CudaUnavailable(
                f"{library} was loaded, but cuInit failed: {self._error_name(code)} ({code}). "
                "Check that `nvidia-smi` lists a GPU here and that CUDA_VISIBLE_DEVICES does not "
                "hide it."
            )
        if self.device_count() == 0:
            raise CudaUnavailable(
                f"{library} was loaded, but shows no device. Check CUDA_VISIBLE_DEVICES."
            )

    def _call(self, name: str, *arguments: object) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise CudaError(code, self._error_name(code), name)

    def _error_name(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._functions["cuGetErrorName"](code, ctypes.byref(name))
        return name.value.decode() if name.value else "unrecognised error"

    # --- devices ---

    def version(self) -> int:
        """The CUDA version of the driver, as 1000 * major + 10 * minor (13000 is 13.0)."""
        version = Int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return version.value

    @property
    def has_stream_values(self) -> bool:
        """Whether streams can wait for values (CUDA 11.7): `take_values`, `write_value`."""
        return all(name in self._functions for name in STREAM_VALUE_CALLS)

    def device_count(self) -> int:
        """How many devices this process sees (after CUDA_VISIBLE_DEVICES)."""
        count = Int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def _device(self, ordinal: int) -> int:
        device = Device()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device.value

    def device_uuid(self, ordinal: int) -> str:
        """The device's name across processes, as nvidia-smi prints it:
        "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"."""
        octets = Uuid()
        call = next(name for name in UUID_CALLS if name in self._functions)
        self._call(call, ctypes.byref(octets), self._device(ordinal))
        return f"GPU-{uuids.UUID(bytes=bytes(octets))}"

    def device_name(self, ordinal: int) -> str:
        """The product name, for people ("NVIDIA H200")."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device(ordinal))
        return name.value.decode(errors="replace")

    def ordinal_of(self, uuid: str) -> int:
        """The ordinal in this process of the device that ``device_uuid`` named in another one.

        Raises ``CudaUnavailable``, naming the devices seen here, if it is not among them.
        """
        visible = [self.device_uuid(ordinal) for ordinal in range(self.device_count())]
        if uuid not in visible:
            raise CudaUnavailable(
                f"device {uuid} is not visible to this process, which sees {', '.join(visible)}. "
                "Check CUDA_VISIBLE_DEVICES here and in the daemon."
            )
        return visible.index(uuid)

    def memory_info(self, ordinal: int) -> tuple[int, int]:
        """(free, total) bytes of the device, over all processes.

        Makes the device's primary context, which itself costs device memory (523 MiB on an H200).
        """
        free, total = Size(), Size()
        with self.context(ordinal):
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # --- contexts ---

    @contextlib.contextmanager
    def context(self, ordinal: int) -> Iterator[None]:
        """Make the device's primary context current on the calling thread, then the former one.

        It is the context that torch uses, so pointers are good on both sides. It is made at the
        first use and kept. Do not hold it across an ``await``: the thread would go on to run other
        code with it.
        """
        primary = self._enter_primary(ordinal)
        try:
            self._call("cuCtxPushCurrent_v2", primary.pointer)
            popped = Context()
            try:
                yield
            except BaseException:
                # Unchecked: after a device fault this fails too, and would hide the first error.
                self._functions["cuCtxPopCurrent_v2"](ctypes.byref(popped))
                raise
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))
        finally:
            with self._contexts_lock:
                primary.users -= 1

    def _enter_primary(self, ordinal: int) -> _PrimaryContext:
        # The lock is held while the context is made (a second or so): two retains would need two
        # releases. Not reentrant for the same reason, so nothing that a finalizer runs may come
        # here: RegionTable has a thread for it.
        with self._contexts_lock:
            primary = self._contexts.get(ordinal)
            if primary is None:
                device = self._device(ordinal)
                pointer = Context()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(pointer), device)
                primary = self._contexts[ordinal] = _PrimaryContext(device, pointer.value or 0)
            primary.users += 1
            return primary

    def reach_peer(self, ordinal: int, peer: int) -> None:
        """Let one device read another's memory by itself, as NVLink or PCIe allow.

        Where they do not, copies between the two go through host memory, and are right all the
        same. What another library enabled before stays so.
        """
        with self.context(peer):
            pass
        with self.context(ordinal):
            try:
                self._call("cuCtxEnablePeerAccess", self._contexts[peer].pointer, 0)
            except CudaError as error:
                if error.code not in (_PEER_ACCESS_UNSUPPORTED, _PEER_ACCESS_ALREADY_ENABLED):
                    raise

    def release_primary_context(self, ordinal: int) -> None:
        """Give up the hold that ``context`` took, if any. The process's last hold frees its memory.

        Raises ``RuntimeError`` while some thread is inside ``context(ordinal)``.
        """
        with self._contexts_lock:
            primary = self._contexts.get(ordinal)
            if primary is None:
                return
            if primary.users:
                raise RuntimeError(
                    f"the context of device {ordinal} is in use by {primary.users} thread(s); "
                    "leave context() first"
                )
            self._call("cuDevicePrimaryCtxRelease_v2", primary.device)
            del self._contexts[ordinal]

    # --- memory: all of these need a current context ---

    def mem_alloc(self, nbytes: int) -> int:
        """Allocate ``nbytes`` on the current device. To be exported, ask for a multiple of 2 MiB:
        the driver packs smaller allocations into a shared one."""
        _require_bytes(nbytes, at_least=1)
        pointer = DevicePointer()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), nbytes)
        return pointer.value

    def mem_free(self, ptr: int) -> None:
        """Free what ``mem_alloc`` gave. Other processes that map it should have closed it before:
        the driver promises nothing if not, though the memory was seen to live on."""
        self._call("cuMemFree_v2", ptr)

    def ipc_get_handle(self, ptr: int) -> bytes:
        """The 64-byte handle by which another process opens an allocation of this one.

        ``ptr`` is the base address from ``mem_alloc``; an imported pointer is refused (1). Whoever
        has the handle has the memory: never log it.
        """
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ptr)
        return bytes(handle)

    def ipc_open_handle(self, handle: bytes) -> int:
        """Map another process's allocation and return its device address here.

        Once per process: the caller counts its users. Raises ``ValueError`` for a handle that is
        not 64 bytes, ``CudaError`` for one that the driver refuses (201 in the exporting process).
        """
        if len(handle) != IPC_HANDLE_BYTES:
            raise ValueError(
                f"a CUDA IPC memory handle has {IPC_HANDLE_BYTES} bytes, not {len(handle)}"
            )
        pointer = DevicePointer()
        structure = IpcHandle.from_buffer_copy(handle)
        self._call(
            "cuIpcOpenMemHandle_v2", ctypes.byref(pointer), structure, _IPC_LAZY_ENABLE_PEER_ACCESS
        )
        return pointer.value

    def ipc_close_handle(self, ptr: int) -> None:
        """Unmap what ``ipc_open_handle`` gave. Synchronise first."""
        self._call("cuIpcCloseMemHandle", ptr)

    def copy_to_device(self, ptr: int, buffer: bytes | bytearray | memoryview) -> None:
        """Copy a C-contiguous host buffer to ``ptr``, after the default stream's earlier work.

        ``synchronize`` before another process may read it: the last bytes may still be in the
        driver's staging memory on return. Pageable, so slow (9 GB/s): not for whole models.
        """
        view = memoryview(buffer).cast("B")
        # A writable buffer goes in one piece, without a copy.
        step = _STAGE_BYTES if view.readonly else max(view.nbytes, 1)
        for start in range(0, view.nbytes, step):
            piece = view[start : start + step]
            array = ctypes.c_char * piece.nbytes
            host = array.from_buffer_copy(piece) if view.readonly else array.from_buffer(piece)
            self._call("cuMemcpyHtoD_v2", ptr + start, ctypes.addressof(host), piece.nbytes)

    def mem_host_alloc(self, nbytes: int) -> int:
        """Allocate pinned host memory, which the device copies from by itself (55 GB/s)."""
        _require_bytes(nbytes, at_least=1)
        pointer = HostPointer()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), nbytes, _HOST_ALLOC_PORTABLE)
        return pointer.value or 0

    def mem_free_host(self, ptr: int) -> None:
        """Free what ``mem_host_alloc`` gave, after the copies from it are done."""
        self._call("cuMemFreeHost", ptr)

    def view_host(self, ptr: int, nbytes: int) -> memoryview:
        """The bytes of pinned memory, writable; not to be touched once it is freed."""
        return memoryview((ctypes.c_ubyte * nbytes).from_address(ptr)).cast("B")

    def stream_create(self) -> int:
        """A stream that neither waits for the legacy default stream nor is waited for by it."""
        stream = Stream()
        self._call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return stream.value or 0

    def stream_synchronize(self, stream: int) -> None:
        """Wait until all work of a stream is done. A fault in it is raised here."""
        self._call("cuStreamSynchronize", stream)

    def stream_destroy(self, stream: int) -> None:
        """Give a stream back. Its work is not waited for."""
        self._call("cuStreamDestroy_v2", stream)

    def copy_to_device_async(self, ptr: int, host: int, nbytes: int, stream: int) -> None:
        """Copy ``nbytes`` of pinned memory at ``host`` to ``ptr`` on a stream. Returns before it is
        done: leave the source alone until ``stream_synchronize``."""
        _require_bytes(nbytes)
        if nbytes:
            self._call("cuMemcpyHtoDAsync_v2", ptr, host, nbytes, stream)

    def copy_from_device(self, ptr: int, nbytes: int) -> bytes:
        """Copy ``nbytes`` from ``ptr`` to the host, after the default stream's earlier work."""
        _require_bytes(nbytes)
        if nbytes == 0:
            return b""
        host = (ctypes.c_char * nbytes)()
        self._call("cuMemcpyDtoH_v2", ctypes.addressof(host), ptr, nbytes)
        return host.raw

    def copy_on_device(self, dst: int, src: int, nbytes: int) -> None:
        """Copy ``nbytes`` between allocations, also of two devices: see `reach_peer`.

        Returns before it is done: ``synchronize``.
        """
        _require_bytes(nbytes)
        if nbytes:
            self._call("cuMemcpyDtoD_v2", dst, src, nbytes)

    def copy_on_device_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """`copy_on_device` in the order of a stream, which a graph that is recorded takes up."""
        _require_bytes(nbytes)
        if nbytes:
            self._call("cuMemcpyDtoDAsync_v2", dst, src, nbytes, stream)

    def write_value(self, ptr: int, value: int, stream: int) -> None:
        """Have a stream write 32 bits when its earlier work is done and seen by all.

        ``ptr``: a multiple of 4, also of another device's memory that is open here.
        """
        self._call("cuStreamWriteValue32_v2", stream, ptr, value, 0)

    def take_values(self, ptrs: Sequence[int], value: int, stream: int) -> None:
        """Have a stream go on once the 32 bits at each place are equal to a value, now 0 again.

        Whoever writes them may be on another device. If nobody does, the stream waits for ever.
        All are one operation of the stream's; at most 128.
        """
        waits = [ValueOperation(_OPERATION_WAIT, ptr, value, _WAIT_UNTIL_EQUAL) for ptr in ptrs]
        writes = [ValueOperation(_OPERATION_WRITE, ptr, 0, 0) for ptr in ptrs]
        operations = (ValueOperation * (2 * len(ptrs)))(*waits, *writes)
        self._call("cuStreamBatchMemOp_v2", stream, len(operations), operations, 0)

    def memset_async(self, ptr: int, value: int, nbytes: int, stream: int = 0) -> None:
        """Set ``nbytes`` at ``ptr`` to the byte ``value`` (0..255) on a stream (0: the legacy
        default stream). Returns before it is done: ``synchronize``."""
        _require_bytes(nbytes)
        if not 0 <= value <= 255:
            raise ValueError(f"a byte value is 0..255, not {value}")
        if nbytes:
            self._call("cuMemsetD8Async", ptr, value, nbytes, stream)

    def synchronize(self) -> None:
        """Wait until all work of the current context is done. A fault in it is raised here."""
        self._call("cuCtxSynchronize")

    def is_host_memory(self, ptr: int) -> bool:
        """Whether the CPU may read ``ptr``: then tensors over it are CPU tensors.

        Never so for device memory. Raises ``CudaError`` (1) for memory unknown to the driver.
        """
        # It is how the tests' fake driver says what it is: its "device" memory is shared host
        # memory, and a CUDA tensor over it would be a wild pointer. Asked of the driver and not of
        # a setting, so that the two cannot disagree.
        kind = UInt()
        self._call("cuPointerGetAttribute", ctypes.byref(kind), _ATTRIBUTE_MEMORY_TYPE, ptr)
        return kind.value == _MEMORY_TYPE_HOST


def _require_bytes(nbytes: int, *, at_least: int = 0) -> None:
    # ctypes would wrap a negative size to a huge one without a word.
    if nbytes < at_least:
        raise ValueError(f"a size of at least {at_least} bytes is needed, not {nbytes}")
