"""Tensors over a region: views, never copies. The only part of the protocol that needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import BadMessage
from ..manifest import DTYPE_BYTES, TensorSpec, lay_out
from .base import MappingBytes
from .file_parts import FilePart, OnBytes, unheard

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name. Raises BadMessage if this torch lacks it."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise BadMessage(f"torch {torch.__version__} has no dtype {name}")
    return dtype


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises BadMessage for one that has none."""
    wanted = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == wanted:
            return name
    raise BadMessage(f"tensors of dtype {wanted} cannot be shared")


def view_tensors(region: MappingBytes, tensors: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """One tensor per spec, on the region's device, whose ``data_ptr`` lies inside the region.

    Shapes and strides are the spec's; the tensors do not require gradients and keep ``region``
    alive. Writing to one of a sealed host region kills the process (SIGSEGV): there is no copy.
    """
    import torch

    if region.mapping.on_host:
        import numpy

        whole = torch.from_numpy(numpy.asarray(region))
    else:
        # as_tensor wraps __cuda_array_interface__ without a copy, under every torch allocator.
        whole = torch.as_tensor(region, device=torch.device("cuda", region.mapping.ordinal))
    storage = whole.untyped_storage()
    views = {}
    for spec in tensors:
        if spec.offset + spec.nbytes > region.mapping.nbytes:
            raise BadMessage(f"tensor {spec.name!r} ends beyond its region")
        strides = spec.strides if spec.strides is not None else _contiguous(spec.shape)
        views[spec.name] = torch.empty(0, dtype=torch_dtype(spec.dtype), device=whole.device).set_(
            storage, spec.offset // DTYPE_BYTES[spec.dtype], torch.Size(spec.shape), strides
        )
    return views


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """The manifest under which these tensors can be handed over.

    Strides of dense layouts (channels_last) are kept; anything else becomes contiguous. Names for
    the same memory (tied weights) share one range.
    """
    specs, aliases = [], {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        dense = tensor.numel() == 0 or (
            (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1)
            == tensor.numel()
        )
        strides = list(tensor.stride()) if dense and not tensor.is_contiguous() else None
        dtype = safetensors_dtype(tensor.dtype)
        specs.append(TensorSpec(name, dtype, list(tensor.shape), 0, strides))
        identity = (tensor.device, tensor.data_ptr(), dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and tensor.device.type != "meta":
            original = seen.setdefault(identity, name)
            if original != name:
                aliases[name] = original
    return lay_out(specs, aliases)


def copy_into(
    region: MappingBytes,
    tensors: Sequence[TensorSpec],
    sources: Mapping[str, torch.Tensor],
    on_bytes: OnBytes = unheard,
) -> None:
    """Copy the source of each spec's name to its place; shapes and dtypes must agree.

    Those in pageable host memory are there when this returns, others once the device is
    synchronised. Raises BadMessage, before anything is copied, and CudaError.
    """
    views = view_tensors(region, tensors)
    for name, view in views.items():
        source = sources[name]
        if source.shape != view.shape or source.dtype != view.dtype:
            raise BadMessage(
                f"tensor {name!r} is {tuple(source.shape)} {source.dtype}, "
                f"its manifest says {tuple(view.shape)} {view.dtype}"
            )
    pageable = {}  # tied names are one range, and threads must not write it at once
    for spec in tensors:
        view, source = views[spec.name], sources[spec.name]
        if _is_pageable_bytes(source, view, region) and source.nbytes == spec.nbytes:
            pageable[spec.offset] = FilePart(source.data_ptr(), spec.offset, spec.nbytes)
        else:
            view.copy_(source.detach(), non_blocking=True)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_bytes(nbytes)

    region.mapping.copy_host_parts(list(pageable.values()), count)
    on_bytes(sum(spec.nbytes for spec in tensors) - done)


def _is_pageable_bytes(source: torch.Tensor, view: torch.Tensor, region: MappingBytes) -> bool:
    """Whether the view's bytes are those at the source's address, which only the CPU reads fast.

    The device copies from pinned memory by itself, in the order of the stream that may still be
    writing it.
    """
    import torch

    return (
        type(source) in (torch.Tensor, torch.nn.Parameter)
        and source.device.type == "cpu"
        and source.layout == torch.strided
        and (source.stride() == view.stride() or (source.is_contiguous() and view.is_contiguous()))
        and not source.is_neg()
        and (region.mapping.on_host or not source.is_pinned())
    )


def _contiguous(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]
