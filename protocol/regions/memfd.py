"""Regions in host memory: nameless memory files, sealed at commit.

A sealed region cannot be written through any mapping or descriptor, by anyone. Attachers get a
descriptor that was opened read-only: kernels before 6.7 refuse even a read-only shared mapping of
a write-sealed file through a writable one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from ..errors import RegionUnavailable, StillMapped
from .base import (
    DeviceFacts,
    Export,
    NotEnoughMemory,
    RegionMapping,
    RegionOwner,
    check_range,
)
from .file_parts import Batch, FilePart, OnBytes, Source, plan_batches
from .readers import read_in_parallel

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # from the first moment
_COMMIT_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_BLOCK_BYTES = 512
_READERS = 2  # one leaves half of what memory gives unused, where there are two processors
_BATCH_BYTES = 16 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def available_host_memory() -> tuple[int, int]:
    """(available, total) bytes for this process: /proc/meminfo, less where a cgroup allows less."""
    fields = {}
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) * 1024
    available, total = fields["MemAvailable"], fields["MemTotal"]
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as lines:
            group = next(line.strip().split("::")[1] for line in lines if line.startswith("0::"))
        base = f"/sys/fs/cgroup{group}"
        with open(f"{base}/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open(f"{base}/memory.current", encoding="ascii") as file:
            current = int(file.read())
    except (OSError, ValueError, StopIteration, IndexError):
        return available, total  # no cgroup v2, or "max"
    return min(available, max(0, limit - current)), min(total, limit)


def create_memfd(nbytes: int, *seals: int, shown_as: str = "xdit-sidecar") -> int:
    """The descriptor of a nameless file of that size, which never changes; OSError.

    ``shown_as``: what /proc/<pid>/maps calls it.
    """
    file = os.memfd_create(shown_as, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, nbytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, sum(seals, _SIZE_SEALS))
    except OSError:
        os.close(file)
        raise
    return file


class MemfdOwner(RegionOwner):
    """The keeper's side of host regions."""

    kind = "memfd"

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._sealed: set[str] = set()

    def facts(self) -> DeviceFacts:
        available, total = available_host_memory()
        # Pages come into being when they are first written, so a region that is being filled is
        # not yet missing from what the kernel calls available.
        promised = sum(
            max(0, found.st_size - found.st_blocks * _BLOCK_BYTES)
            for found in map(os.fstat, self._files.values())
        )
        return DeviceFacts("host memory", total, max(0, available - promised), 0)

    def allocate(self, region: str, nbytes: int) -> None:
        free = self.facts().free
        if nbytes > free:
            raise NotEnoughMemory(nbytes, free)
        self._files[region] = create_memfd(nbytes)

    def export(self, region: str) -> Export:
        file = self._files[region]
        if region in self._sealed:
            return Export(descriptor=os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC))
        return Export(descriptor=os.dup(file))

    def seal(self, region: str) -> None:
        try:
            fcntl.fcntl(self._files[region], fcntl.F_ADD_SEALS, _COMMIT_SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise StillMapped(
                "the region is still mapped writable: drop every tensor that views it, then commit"
            ) from None
        self._sealed.add(region)

    def free(self, region: str) -> None:
        file = self._files.pop(region, None)
        if file is not None:
            os.close(file)
        self._sealed.discard(region)

    def read(self, region: str, offset: int, length: int) -> bytes:
        file = self._files[region]
        check_range(offset, length, os.fstat(file).st_size)
        return os.pread(file, length, offset)

    def write(self, region: str, offset: int, data: bytes) -> None:
        file = self._files[region]
        check_range(offset, len(data), os.fstat(file).st_size)
        os.pwrite(file, data, offset)

    def close(self) -> None:
        for region in list(self._files):
            self.free(region)


class MemfdMapping(RegionMapping):
    """A client's map of a host region. Takes over ``descriptor``."""

    on_host = True
    ordinal = 0

    def __init__(self, descriptor: int, nbytes: int, *, writable: bool) -> None:
        try:
            if os.fstat(descriptor).st_size < nbytes:
                # Touching pages beyond the end would be SIGBUS.
                raise RegionUnavailable("the region's file is shorter than the daemon said")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, descriptor, 0)
            if address == _MAP_FAILED:
                code = ctypes.get_errno()
                raise RegionUnavailable(
                    f"mapping a region of {nbytes} bytes failed: {os.strerror(code)}"
                )
        finally:
            os.close(descriptor)
        self.address = address
        self.nbytes = nbytes
        self.writable = writable

    def synchronize(self) -> None:
        """Nothing is ever in flight in host memory."""

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.nbytes)
        return ctypes.string_at(self.address + offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        check_range(offset, len(data), self.nbytes)
        self._require_writable()
        self.buffer(offset, len(data))[:] = data

    def fill_parts(self, source: Source, parts: Sequence[FilePart], on_bytes: OnBytes) -> None:
        self._check_parts(parts)
        self._require_writable()

        def read(batch: Batch) -> None:
            # From the file's pages or the source's to the region's: nothing lies in between.
            for position, offset, length in batch:
                with self.buffer(offset, length) as target:
                    source(position, target)

        batches = list(plan_batches(parts, _BATCH_BYTES))
        readers = min(_READERS, len(batches))
        read_in_parallel(batches, lambda: contextlib.nullcontext(read), readers, on_bytes)

    def _require_writable(self) -> None:
        if not self.writable:
            raise RegionUnavailable("the region is sealed: it can be read, never written")

    def buffer(self, offset: int, length: int) -> memoryview:
        """Writable bytes of the region; not to be kept beyond the mapping."""
        check_range(offset, length, self.nbytes)
        array = (ctypes.c_ubyte * length).from_address(self.address + offset)
        return memoryview(array).cast("B")

    def close(self) -> None:
        if self.address:
            _libc.munmap(self.address, self.nbytes)
            self.address = 0
