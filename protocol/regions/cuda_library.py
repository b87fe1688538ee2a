"""The shared library of the CUDA driver: its symbols, their C types, and loading it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

LIBRARY_VARIABLE = "XDIT_SIDECAR_LIBCUDA"
"""Environment variable naming the library to load instead of ``libcuda.so.1`` (WSL, containers,
tests)."""

IPC_HANDLE_BYTES = 64


class CudaUnavailable(Exception):
    """There is no usable driver or device; the message says what was found and what to do."""


class Uuid(ctypes.Structure):
    _fields_ = [("octets", ctypes.c_ubyte * 16)]


class IpcHandle(ctypes.Structure):
    # A structure, because the driver takes it by value; c_ubyte, because c_char arrays are cut at
    # a zero byte.
    _fields_ = [("octets", ctypes.c_ubyte * IPC_HANDLE_BYTES)]


class ValueOperation(ctypes.Structure):
    """``CUstreamBatchMemOpParams``, of 32 bits each."""

    _fields_ = [
        ("operation", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("rest", ctypes.c_uint64),
    ]


Int = ctypes.c_int
UInt = ctypes.c_uint
Size = ctypes.c_size_t
Device = ctypes.c_int
DevicePointer = ctypes.c_uint64
Context = ctypes.c_void_p
Stream = ctypes.c_void_p
HostPointer = ctypes.c_void_p

UUID_CALLS = ("cuDeviceGetUuid_v2", "cuDeviceGetUuid")
STREAM_VALUE_CALLS = ("cuStreamBatchMemOp_v2", "cuStreamWriteValue32_v2")
"""That a driver before CUDA 11.7 lacks; nothing but faster exchanges needs them."""

# Every call has its argument types: without them ctypes passes 64-bit pointers as 32-bit ints.
_SIGNATURES: Mapping[str, tuple[type, ...]] = {
    "cuInit": (UInt,),
    "cuGetErrorName": (Int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDriverGetVersion": (ctypes.POINTER(Int),),
    "cuDeviceGetCount": (ctypes.POINTER(Int),),
    "cuDeviceGet": (ctypes.POINTER(Device), Int),
    "cuDeviceGetName": (ctypes.c_char_p, Int, Device),
    "cuDeviceGetUuid_v2": (ctypes.POINTER(Uuid), Device),
    "cuDeviceGetUuid": (ctypes.POINTER(Uuid), Device),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(Context), Device),
    "cuDevicePrimaryCtxRelease_v2": (Device,),
    "cuCtxPushCurrent_v2": (Context,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(Context),),
    "cuCtxSynchronize": (),
    "cuCtxEnablePeerAccess": (Context, UInt),
    "cuMemGetInfo_v2": (ctypes.POINTER(Size), ctypes.POINTER(Size)),
    "cuMemAlloc_v2": (ctypes.POINTER(DevicePointer), Size),
    "cuMemFree_v2": (DevicePointer,),
    "cuIpcGetMemHandle": (ctypes.POINTER(IpcHandle), DevicePointer),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(DevicePointer), IpcHandle, UInt),
    "cuIpcCloseMemHandle": (DevicePointer,),
    "cuMemcpyHtoD_v2": (DevicePointer, HostPointer, Size),
    "cuMemcpyDtoH_v2": (HostPointer, DevicePointer, Size),
    "cuMemcpyDtoD_v2": (DevicePointer, DevicePointer, Size),
    "cuMemHostAlloc": (ctypes.POINTER(HostPointer), Size, UInt),
    "cuMemFreeHost": (HostPointer,),
    "cuMemcpyHtoDAsync_v2": (DevicePointer, HostPointer, Size, Stream),
    "cuStreamCreate": (ctypes.POINTER(Stream), UInt),
    "cuStreamSynchronize": (Stream,),
    "cuStreamDestroy_v2": (Stream,),
    "cuMemsetD8Async": (DevicePointer, ctypes.c_ubyte, Size, Stream),
    "cuPointerGetAttribute": (ctypes.c_void_p, Int, DevicePointer),
    "cuMemcpyDtoDAsync_v2": (DevicePointer, DevicePointer, Size, Stream),
    "cuStreamBatchMemOp_v2": (Stream, UInt, ctypes.POINTER(ValueOperation), UInt),
    "cuStreamWriteValue32_v2": (Stream, DevicePointer, UInt, UInt),
}

Function = Callable[..., int]


def load_functions(library: str) -> dict[str, Function]:
    """The driver's functions by name, each returning a CUresult; of ``UUID_CALLS`` at least one.

    Raises ``CudaUnavailable`` if the library cannot be loaded or lacks symbols.
    """
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise CudaUnavailable(
            f"the CUDA driver library {library} cannot be loaded ({error}). "
            f"Install the NVIDIA driver, or name its library in {LIBRARY_VARIABLE}."
        ) from error
    functions: dict[str, Function] = {}
    missing = []
    for name, argument_types in _SIGNATURES.items():
        try:
            function = loaded[name]
        except AttributeError:
            missing.append(name)
            continue
        function.argtypes = argument_types
        function.restype = Int
        functions[name] = function
    # One of the two ways to ask for a UUID is enough: the second version came with CUDA 11.4.
    if any(name in functions for name in UUID_CALLS):
        missing = [name for name in missing if name not in UUID_CALLS]
    if missing := [name for name in missing if name not in STREAM_VALUE_CALLS]:
        raise CudaUnavailable(
            f"{library} lacks {', '.join(missing)}: it is too old or no CUDA driver. "
            "CUDA 11.0 or later is needed."
        )
    return functions
