"""The two sides of a region: who owns the memory, and who maps it."""

from __future__ import annotations

import abc
import ctypes
import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ..errors import ProbeFailed
from ..messages import RegionKind
from .file_parts import FilePart, OnBytes, Source, unheard

# Read from a file at a time, where the bytes must pass through this process.
_STAGE_BYTES = 32 * 1024 * 1024


class DeviceFacts(NamedTuple):
    """What an owner knows of its device. Sizes in bytes."""

    name: str
    total: int
    free: int
    context: int  # what owning regions costs by itself (a CUDA context)


class Export(NamedTuple):
    """How a region travels to a lease holder: one of the two is set."""

    handle: bytes | None = None
    descriptor: int | None = None


class NotEnoughMemory(Exception):
    """The device refused an allocation."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} bytes needed, {free} free")
        self.needed = needed
        self.free = free


class RegionOwner(abc.ABC):
    """Holds the regions of one device, through the system or driver alone. Single-threaded."""

    kind: RegionKind

    @abc.abstractmethod
    def facts(self) -> DeviceFacts:
        """Name and memory of the device, now."""

    @abc.abstractmethod
    def allocate(self, region: str, nbytes: int) -> None:
        """Make a region. Raises :class:`NotEnoughMemory`."""

    @abc.abstractmethod
    def export(self, region: str) -> Export:
        """What a lease holder needs to map it; writable until it is sealed."""

    @abc.abstractmethod
    def seal(self, region: str) -> None:
        """No more writes. Raises :class:`~..errors.StillMapped` where the system can tell."""

    @abc.abstractmethod
    def free(self, region: str) -> None:
        """Give the memory back. Unknown regions are ignored."""

    @abc.abstractmethod
    def read(self, region: str, offset: int, length: int) -> bytes:
        """Bytes of a region, for probes."""

    @abc.abstractmethod
    def write(self, region: str, offset: int, data: bytes) -> None:
        """Overwrite bytes of a region that is not sealed, for probes."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free everything."""


class RegionMapping(abc.ABC):
    """A region opened in this process.

    ``address`` is where it starts; ``on_host`` tells whether the CPU can read it there. Safe to
    close from any thread, once no view of it is left.
    """

    address: int
    nbytes: int
    on_host: bool
    ordinal: int  # of the CUDA device, 0 for host regions

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that this process had queued on the device is done."""

    @abc.abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the region as this process sees them."""

    @abc.abstractmethod
    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Overwrite bytes, at the latest when :meth:`synchronize` returns."""

    def read_file(self, descriptor: int, position: int, offset: int, length: int) -> None:
        """Read ``length`` bytes of a file at ``position`` into the region at ``offset``.

        The descriptor's own position is left alone. Raises OSError, and EOFError when the file
        ends before that.
        """
        self.read_file_parts(descriptor, [FilePart(position, offset, length)])

    def read_file_parts(
        self, descriptor: int, parts: Sequence[FilePart], on_bytes: OnBytes = unheard
    ) -> None:
        """Read many parts of a file, which must not overlap in the region, in any order.

        Like :meth:`read_file`.
        """
        self.fill_parts(partial(read_exactly, descriptor), parts, on_bytes)

    def copy_host_parts(self, parts: Sequence[FilePart], on_bytes: OnBytes = unheard) -> None:
        """Copy many parts of this process's memory, whose positions are addresses.

        Like :meth:`read_file_parts`. Nothing reads them any more when this returns or raises.
        """
        self.fill_parts(copy_host_bytes, parts, on_bytes)

    def fill_parts(self, source: Source, parts: Sequence[FilePart], on_bytes: OnBytes) -> None:
        """What both are: here through one pageable buffer, in order."""
        self._check_parts(parts)
        longest = max((part.length for part in parts), default=0)
        stage = memoryview(bytearray(min(longest, _STAGE_BYTES)))
        for position, offset, length in parts:
            for done in range(0, length, _STAGE_BYTES):
                piece = stage[: length - done]
                source(position + done, piece)
                self.write(offset + done, piece)
                on_bytes(piece.nbytes)

    def _check_parts(self, parts: Sequence[FilePart]) -> None:
        for part in parts:
            check_range(part.offset, part.length, self.nbytes)

    def copy_region(self, source: RegionMapping) -> None:
        """Copy a whole region of the same layout: of another device, or one whose keeper died."""
        for offset in range(0, source.nbytes, _STAGE_BYTES):
            length = min(_STAGE_BYTES, source.nbytes - offset)
            self.write(offset, source.read(offset, length))

    @abc.abstractmethod
    def close(self) -> None:
        """Synchronise and unmap. Safe to call twice."""


class MappingBytes:
    """The bytes of a mapping for numpy and torch; whoever views it keeps it alive.

    Both array interfaces declare the memory writable even when it is mapped read-only: torch has
    no read-only tensors, and a write to a sealed region ends in SIGSEGV, never in a copy.
    """

    def __init__(self, mapping: RegionMapping) -> None:
        self.mapping = mapping
        interface = {
            "shape": (mapping.nbytes,),
            "typestr": "|u1",
            "data": (mapping.address, False),
            "version": 3,
        }
        if mapping.on_host:
            self.__array_interface__ = interface
        else:
            self.__cuda_array_interface__ = interface


def read_exactly(descriptor: int, position: int, target: memoryview) -> None:
    """Fill ``target`` with a file's bytes at ``position``. Raises OSError and EOFError."""
    done = 0
    while done < target.nbytes:
        got = os.preadv(descriptor, [target[done:]], position + done)
        if not got:
            missing = target.nbytes - done
            raise EOFError(f"the file ends at byte {position + done}, {missing} bytes too early")
        done += got


def copy_host_bytes(address: int, target: memoryview) -> None:
    """Fill ``target`` with the bytes at an address of this process. Other threads run meanwhile."""
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), address, target.nbytes)


def check_range(offset: int, length: int, nbytes: int) -> None:
    """Raise ProbeFailed unless [offset, offset + length) lies inside a region of ``nbytes``."""
    if offset < 0 or length < 0 or offset + length > nbytes:
        raise ProbeFailed(f"bytes {offset} to {offset + length} of a region of {nbytes}")
