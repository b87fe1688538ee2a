"""Tensors as raw frames of the bulk socket: contiguous, little-endian, described beside them.

One that is larger than a frame may be travels in several; its size says in how many.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Literal, cast, get_args

from . import limits
from .errors import BadMessage
from .messages import TensorPart
from .regions.views import safetensors_dtype, torch_dtype

if TYPE_CHECKING:
    from mmap import mmap

    import torch

Buffer = bytes | memoryview
_Dtype = Literal["F32", "F16", "BF16", "I64", "U8"]


def describe_tensor(
    name: str,
    tensor: torch.Tensor,
    digest: bytes | None = None,
    *,
    inline: bool = True,
    offset: int | None = None,
) -> TensorPart:
    """What a message says of a tensor. Raises BadMessage for a dtype that does not travel."""
    dtype = safetensors_dtype(tensor.dtype)
    if dtype not in get_args(_Dtype):
        raise BadMessage(f"tensor {name!r} is {dtype}; use one of {', '.join(get_args(_Dtype))}")
    shape = list(tensor.shape)
    return TensorPart(
        name=name,
        dtype=cast(_Dtype, dtype),
        shape=shape,
        digest=digest,
        inline=inline,
        offset=offset,
    )


def pack_tensor(
    name: str, tensor: torch.Tensor, digest: bytes | None = None
) -> tuple[TensorPart, list[memoryview]]:
    """A tensor's description and its frames.

    Copied only from a device or if it is not contiguous; the frames keep what they show alive.
    """
    part = describe_tensor(name, tensor, digest)
    data = _bytes_of(tensor.detach().cpu().contiguous())
    starts = range(0, max(1, len(data)), limits.BULK_FRAME)
    return part, [data[start : start + limits.BULK_FRAME] for start in starts]


def unpack_tensor(part: TensorPart, frames: Iterator[Buffer], *, copy: bool = True) -> torch.Tensor:
    """A tensor in host memory, from the next frames.

    Not ``copy``: it may show a frame's memory, and is not to be written to. Raises BadMessage if
    their bytes are too few or too many.
    """
    import torch

    arrived = list(islice(frames, min(part.frames, limits.BULK_PARTS)))
    if (nbytes := sum(map(len, arrived))) != part.nbytes:
        raise BadMessage(f"tensor {part.name!r}: {nbytes} bytes came, {part.nbytes} expected")
    dtype = torch_dtype(part.dtype)
    if not copy and part.nbytes and len(arrived) == 1 and not memoryview(arrived[0]).readonly:
        shown = torch.frombuffer(arrived[0], dtype=dtype)
        if shown.data_ptr() % dtype.itemsize == 0:
            return shown.view(part.shape)
    tensor = torch.empty(part.shape, dtype=dtype)
    data, start = _bytes_of(tensor), 0
    for frame in arrived:
        data[start : start + len(frame)] = frame
        start += len(frame)
    return tensor


def unpack_tensors(
    parts: Iterable[TensorPart], frames: Iterable[Buffer], scratch: mmap | None = None
) -> dict[str, torch.Tensor]:
    """Copies of tensors by name, from frames and from a scratch region.

    Raises BadMessage unless the frames are exactly those of the inline ones, and for what does not
    lie within the region.
    """
    arriving = iter(frames)
    tensors = {
        part.name: unpack_tensor(part, arriving)
        if part.offset is None
        else view_placed(scratch, part).clone()
        for part in parts
    }
    if next(arriving, None) is not None:
        raise BadMessage(f"more frames came than {len(tensors)} tensors have")
    return tensors


def view_placed(scratch: mmap | None, part: TensorPart) -> torch.Tensor:
    """A tensor that lies at its offset of a scratch region, writable: the region's own memory.

    Raises BadMessage if it does not lie within.
    """
    import torch

    offset, dtype = part.offset or 0, torch_dtype(part.dtype)
    if scratch is None or offset % dtype.itemsize or offset + part.nbytes > len(scratch):
        raise BadMessage(f"tensor {part.name!r} does not lie in a scratch region of this job")
    if not part.nbytes:
        return torch.empty(part.shape, dtype=dtype)
    elements = part.nbytes // dtype.itemsize
    return torch.frombuffer(scratch, dtype=dtype, count=elements, offset=offset).view(part.shape)


def digest_tensor(tensor: torch.Tensor) -> bytes:
    """32 bytes that name dtype, shape and contents."""
    part, frames = pack_tensor("", tensor)
    digest = hashlib.blake2b(f"{part.dtype}{part.shape}".encode(), digest_size=32)
    for frame in frames:
        digest.update(frame)
    return digest.digest()


def _bytes_of(host: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory; needs no numpy."""
    if not host.nbytes:
        return memoryview(bytearray())
    array = (ctypes.c_char * host.nbytes).from_address(host.data_ptr())
    array.owner = host  # type: ignore[attr-defined]  # lives as long as the buffer
    return memoryview(array).cast("B")
