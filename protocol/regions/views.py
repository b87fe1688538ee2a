"""Tensors over a region: views, never copies. The only part of the protocol that needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import BadMessage
from ..manifest import DTYPE_BYTES, TensorSpec, lay_out
from .base import MappingBytes

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


def copy_into(views: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Copy each source into the view of its name; shapes and dtypes must agree."""
    for name, view in views.items():
        source = sources[name]
        if source.shape != view.shape or source.dtype != view.dtype:
            raise BadMessage(
                f"tensor {name!r} is {tuple(source.shape)} {source.dtype}, "
                f"its manifest says {tuple(view.shape)} {view.dtype}"
            )
        view.copy_(source.detach(), non_blocking=True)


def _contiguous(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return strides[::-1]
