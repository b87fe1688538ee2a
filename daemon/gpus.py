"""The machine's GPUs as NVML tells: names, memory, links. Makes no context, needs no torch."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Links = Literal["nvlink", "peer", "none", "unknown"]

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_OK = 0
# nvmlDeviceGetP2PStatus: which capability is asked about.
_P2P_READ, _P2P_NVLINK = 0, 2


@dataclass(frozen=True)
class Gpu:
    """One GPU; sizes in bytes. ``free`` is what no process uses at the moment."""

    name: str
    total: int
    free: int


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def read_gpus(uuids: Sequence[str]) -> list[Gpu]:
    """The GPUs with these UUIDs, in order; those that NVML does not tell about are left out."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        handles = (_handle(nvml, uuid) for uuid in uuids)
        found = (_read(nvml, handle) for handle in handles if handle is not None)
        return [gpu for gpu in found if gpu is not None]


def read_links(uuids: Sequence[str]) -> Links:
    """How these GPUs reach each other, the worst pair counts; "unknown" where NVML cannot say."""
    with _nvml() as nvml:
        if nvml is None or not hasattr(nvml, "nvmlDeviceGetP2PStatus"):
            return "unknown"
        handles = [_handle(nvml, uuid) for uuid in uuids]
        worst: Links = "nvlink"
        for one, other in itertools.permutations(handles, 2):
            if one is None or other is None:
                return "unknown"
            answers = [_p2p(nvml, one, other, asked) for asked in (_P2P_READ, _P2P_NVLINK)]
            if None in answers:
                return "unknown"
            if not answers[0]:
                return "none"
            if not answers[1]:
                worst = "peer"
        return worst if len(handles) > 1 else "unknown"


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != _OK:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: ctypes.CDLL, uuid: str) -> ctypes.c_void_p | None:
    device = ctypes.c_void_p()
    code = nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device))
    return device if code == _OK else None


def _read(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> Gpu | None:
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), _Memory()
    if nvml.nvmlDeviceGetName(device, name, _NAME_BYTES) != _OK:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != _OK:
        return None
    return Gpu(name.value.decode(errors="replace"), int(memory.total), int(memory.free))


def _p2p(
    nvml: ctypes.CDLL, one: ctypes.c_void_p, other: ctypes.c_void_p, asked: int
) -> bool | None:
    status = ctypes.c_int(-1)
    code = nvml.nvmlDeviceGetP2PStatus(one, other, asked, ctypes.byref(status))
    return status.value == _OK if code == _OK else None
