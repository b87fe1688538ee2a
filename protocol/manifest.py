"""The table of a region: which tensor lies where.

dtype names are those of the safetensors format. Offsets and extents are bytes from the region's
start, shapes and strides are in elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Annotated

import msgspec
from msgspec import Meta

from . import limits
from .errors import BadMessage

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

_Extent = Annotated[int, Meta(ge=0, le=limits.REGION)]
# Printable ASCII, so that the longest name is as many bytes as characters.
_TensorName = Annotated[str, Meta(min_length=1, max_length=limits.NAME, pattern=r"^[\x20-\x7e]*\Z")]
_Extents = Annotated[list[_Extent], Meta(max_length=limits.DIMENSIONS)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a region. ``strides`` None means contiguous (row-major)."""

    name: _TensorName
    dtype: Annotated[str, Meta(max_length=16)]
    shape: _Extents
    offset: _Extent = 0
    strides: _Extents | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element, gaps of a strided layout included."""
        itemsize = DTYPE_BYTES[self.dtype]
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return prod(self.shape) * itemsize
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (last + 1) * itemsize


Manifest = Annotated[list[TensorSpec], Meta(min_length=1, max_length=limits.TENSORS)]


def round_up(nbytes: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-nbytes // multiple) * multiple


def region_bytes(tensors: Iterable[TensorSpec]) -> int:
    """The size of the region that holds them: a positive multiple of 2 MiB."""
    end = max((t.offset + t.nbytes for t in tensors), default=0)
    return max(limits.REGION_GRANULE, round_up(end, limits.REGION_GRANULE))


def check_manifest(tensors: Sequence[TensorSpec]) -> None:
    """Raise :class:`~.errors.BadMessage` naming the first tensor that makes no sense.

    Offsets must be aligned to the element and ranges bounded. Tensors may overlap: tied weights
    are two names for one range, and a region is never written after commit.
    """
    seen = set()
    for tensor in tensors:
        itemsize = DTYPE_BYTES.get(tensor.dtype)
        if itemsize is None:
            raise BadMessage(f"tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
        if tensor.name in seen:
            raise BadMessage(f"tensor {tensor.name!r} appears twice in the manifest")
        seen.add(tensor.name)
        if tensor.strides is not None and len(tensor.strides) != len(tensor.shape):
            raise BadMessage(f"tensor {tensor.name!r} has strides for another rank than its shape")
        if tensor.offset % itemsize:
            raise BadMessage(f"tensor {tensor.name!r} lies at an offset its dtype cannot have")
        if tensor.offset + tensor.nbytes > limits.REGION:
            raise BadMessage(f"tensor {tensor.name!r} ends beyond the largest region")


def lay_out(
    tensors: Iterable[TensorSpec], aliases: dict[str, str] | None = None
) -> list[TensorSpec]:
    """The same tensors with offsets: in order, each aligned to 512 bytes.

    ``aliases`` maps a name to an earlier one whose bytes it shares (tied weights).
    """
    placed: dict[str, TensorSpec] = {}
    end = 0
    for tensor in tensors:
        original = (aliases or {}).get(tensor.name)
        if original is not None:
            offset = placed[original].offset
        else:
            offset = round_up(end, limits.TENSOR_ALIGNMENT)
            end = offset + tensor.nbytes
        placed[tensor.name] = msgspec.structs.replace(tensor, offset=offset)
    return list(placed.values())
