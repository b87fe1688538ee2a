"""Tensors as raw frames of the bulk socket: contiguous, little-endian, described beside them."""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING, Literal, cast, get_args

from .errors import BadMessage
from .messages import TensorPart
from .regions.views import safetensors_dtype, torch_dtype

if TYPE_CHECKING:
    import torch

Buffer = bytes | memoryview
_Dtype = Literal["F32", "F16", "BF16", "I64", "U8"]


def describe_tensor(
    name: str, tensor: torch.Tensor, digest: bytes | None = None, *, inline: bool = True
) -> TensorPart:
    """What a message says of a tensor. Raises BadMessage for a dtype that does not travel."""
    dtype = safetensors_dtype(tensor.dtype)
    if dtype not in get_args(_Dtype):
        raise BadMessage(f"tensor {name!r} is {dtype}; use one of {', '.join(get_args(_Dtype))}")
    shape = list(tensor.shape)
    return TensorPart(
        name=name, dtype=cast(_Dtype, dtype), shape=shape, digest=digest, inline=inline
    )


def pack_tensor(
    name: str, tensor: torch.Tensor, digest: bytes | None = None
) -> tuple[TensorPart, memoryview]:
    """A tensor's description and its bytes.

    Copied only from a device or if it is not contiguous; the buffer keeps what it shows alive.
    """
    part = describe_tensor(name, tensor, digest)
    return part, _bytes_of(tensor.detach().cpu().contiguous())


def unpack_tensor(part: TensorPart, frame: Buffer) -> torch.Tensor:
    """A tensor of its own, in host memory. Raises BadMessage if the bytes are too few or many."""
    import torch

    if len(frame) != part.nbytes:
        raise BadMessage(f"tensor {part.name!r}: {len(frame)} bytes came, {part.nbytes} expected")
    tensor = torch.empty(part.shape, dtype=torch_dtype(part.dtype))
    if part.nbytes:
        _bytes_of(tensor)[:] = frame
    return tensor


def digest_tensor(tensor: torch.Tensor) -> bytes:
    """32 bytes that name dtype, shape and contents."""
    part, data = pack_tensor("", tensor)
    digest = hashlib.blake2b(f"{part.dtype}{part.shape}".encode(), digest_size=32)
    digest.update(data)
    return digest.digest()


def _bytes_of(host: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory; needs no numpy."""
    if not host.nbytes:
        return memoryview(b"")
    array = (ctypes.c_char * host.nbytes).from_address(host.data_ptr())
    array.owner = host  # type: ignore[attr-defined]  # lives as long as the buffer
    return memoryview(array).cast("B")
