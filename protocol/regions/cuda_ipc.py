"""Regions in CUDA device memory: one ``cuMemAlloc`` each, shared by CUDA IPC handle.

The keeper owns the memory through the driver API alone. Importers open the handle under any torch
allocator, ComfyUI's cudaMallocAsync included, because torch's pool is not involved. Every driver
call runs with the device's primary context current on the calling thread: ComfyUI calls from
several. The driver cannot enforce that a committed region is read-only; nobody writes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RegionUnavailable
from .base import (
    DeviceFacts,
    Export,
    NotEnoughMemory,
    RegionMapping,
    RegionOwner,
    check_range,
)
from .cuda_driver import CudaDriver, CudaError, CudaUnavailable
from .file_parts import FilePart, OnBytes, Source
from .staging import fill_through_pinned

_OUT_OF_MEMORY = 2


class CudaIpcOwner(RegionOwner):
    """The keeper's side of device regions on the GPU with this UUID."""

    kind = "cuda_ipc"

    def __init__(self, uuid: str) -> None:
        self._driver = CudaDriver.load()
        self._ordinal = self._driver.ordinal_of(uuid)
        self._regions: dict[str, tuple[int, int]] = {}
        self.context_bytes = 0  # told by whoever measured it; the driver itself cannot say
        with self._driver.context(self._ordinal):
            self._driver.synchronize()

    def facts(self) -> DeviceFacts:
        free, total = self._driver.memory_info(self._ordinal)
        name = self._driver.device_name(self._ordinal)
        return DeviceFacts(name, total, free, self.context_bytes)

    def allocate(self, region: str, nbytes: int) -> None:
        with self._driver.context(self._ordinal):
            try:
                pointer = self._driver.mem_alloc(nbytes)
            except CudaError as error:
                if error.code != _OUT_OF_MEMORY:
                    raise
                raise NotEnoughMemory(nbytes, self.facts().free) from None
        self._regions[region] = (pointer, nbytes)

    def export(self, region: str) -> Export:
        with self._driver.context(self._ordinal):
            return Export(handle=self._driver.ipc_get_handle(self._regions[region][0]))

    def seal(self, region: str) -> None:
        """Nothing to enforce; the client has synchronised its device before it asked."""
        if region not in self._regions:
            raise KeyError(region)

    def free(self, region: str) -> None:
        pointer, _ = self._regions.get(region, (0, 0))
        if pointer:
            with self._driver.context(self._ordinal):
                self._driver.mem_free(pointer)
            del self._regions[region]

    def read(self, region: str, offset: int, length: int) -> bytes:
        pointer, nbytes = self._regions[region]
        check_range(offset, length, nbytes)
        with self._driver.context(self._ordinal):
            return self._driver.copy_from_device(pointer + offset, length)

    def write(self, region: str, offset: int, data: bytes) -> None:
        pointer, nbytes = self._regions[region]
        check_range(offset, len(data), nbytes)
        with self._driver.context(self._ordinal):
            self._driver.copy_to_device(pointer + offset, data)
            self._driver.synchronize()

    def close(self) -> None:
        for region in list(self._regions):
            self.free(region)


class CudaIpcMapping(RegionMapping):
    """A device region opened in this process by its IPC handle."""

    def __init__(self, handle: bytes, uuid: str, nbytes: int) -> None:
        try:
            self._driver = CudaDriver.load()
            self.ordinal = self._driver.ordinal_of(uuid)
            with self._driver.context(self.ordinal):
                self.address = self._driver.ipc_open_handle(handle)
                self.on_host = self._driver.is_host_memory(self.address)
        except (CudaError, CudaUnavailable) as error:
            raise RegionUnavailable(
                f"this process cannot open a region on {uuid}: {error}. CUDA IPC needs the same "
                "GPU and driver, and usually the same PID and IPC namespaces (containers: "
                "--pid=host --ipc=host); `xdit-sidecar ipc health-check` tells which"
            ) from None
        self.nbytes = nbytes

    def synchronize(self) -> None:
        with self._driver.context(self.ordinal):
            self._driver.synchronize()

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.nbytes)
        with self._driver.context(self.ordinal):
            return self._driver.copy_from_device(self.address + offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        check_range(offset, len(data), self.nbytes)
        with self._driver.context(self.ordinal):
            self._driver.copy_to_device(self.address + offset, data)

    def fill_parts(self, source: Source, parts: Sequence[FilePart], on_bytes: OnBytes) -> None:
        """Also raises CudaError. Does not wait for what other streams do to the region."""
        self._check_parts(parts)
        rest = fill_through_pinned(
            self._driver, self.ordinal, self.address, source, parts, on_bytes
        )
        super().fill_parts(source, rest, on_bytes)

    def copy_region(self, source: RegionMapping) -> None:
        if not isinstance(source, CudaIpcMapping):
            super().copy_region(source)
            return
        if source.ordinal != self.ordinal:
            self._driver.reach_peer(self.ordinal, source.ordinal)
        with self._driver.context(self.ordinal):
            self._driver.copy_on_device(self.address, source.address, source.nbytes)

    def close(self) -> None:
        if self.address:
            with self._driver.context(self.ordinal):
                self._driver.synchronize()
                self._driver.ipc_close_handle(self.address)
            self.address = 0
