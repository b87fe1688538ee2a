"""FLUX.1 files in Black Forest Labs' layout, written without the package under test.

Small random ones for numbers, and full-size ones that are all header: the file is as long as the
real one, but nothing of it is on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.flux_detection import detect_flux
from xdit_sidecar.protocol.manifest import TensorSpec

PREFIX = "model.diffusion_model."
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# As e4m3 and e5m2 have it: the largest number.
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}

Shapes = dict[str, tuple[int, ...]]
Entries = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Flux:
    """Sizes of a model; the defaults are a tiny one with everything in it."""

    heads: int = 2
    head_size: int = 16
    double: int = 2
    single: int = 3
    context: int = 24
    pooled: int = 12
    channels: int = 16
    inputs: int = 16
    guidance: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def latent_channels(self) -> int:
        return self.channels // 4


DEV = Flux(24, 128, 19, 38, 4096, 768, 64, 64)
SCHNELL = Flux(24, 128, 19, 38, 4096, 768, 64, 64, guidance=False)
FILL = Flux(24, 128, 19, 38, 4096, 768, 64, 384)
DEPTH = Flux(24, 128, 19, 38, 4096, 768, 64, 128)


def shapes_of(flux: Flux) -> Shapes:
    """Tensor name → shape, of all tensors."""
    width = flux.width
    shapes: Shapes = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def norms(name: str) -> None:
        shapes[f"{name}.query_norm.scale"] = (flux.head_size,)
        shapes[f"{name}.key_norm.scale"] = (flux.head_size,)

    linear("img_in", width, flux.inputs)
    linear("txt_in", width, flux.context)
    for name, columns in (("time_in", 256), ("vector_in", flux.pooled), ("guidance_in", 256)):
        if name != "guidance_in" or flux.guidance:
            linear(f"{name}.in_layer", width, columns)
            linear(f"{name}.out_layer", width, width)
    for i in range(flux.double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * width, width)
            linear(f"{block}_attn.qkv", 3 * width, width)
            norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", width, width)
            linear(f"{block}_mlp.0", 4 * width, width)
            linear(f"{block}_mlp.2", width, 4 * width)
    for i in range(flux.single):
        block = f"single_blocks.{i}"
        linear(f"{block}.linear1", 7 * width, width)
        linear(f"{block}.linear2", width, 5 * width)
        norms(f"{block}.norm")
        linear(f"{block}.modulation.lin", 3 * width, width)
    linear("final_layer.linear", flux.channels, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def random_weights(flux: Flux, seed: int = 0) -> dict[str, torch.Tensor]:
    """fp32 tensors that give outputs of about 1; no two elements mean the same."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes_of(flux).items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith(".scale"):
            weights[name] = 1 + 0.2 * tensor
        else:
            weights[name] = tensor * (0.7 / shape[-1] ** 0.5 if len(shape) == 2 else 0.1)
    return weights


def store(
    weights: Mapping[str, torch.Tensor],
    dtype: str = "F32",
    *,
    scales: str | None = None,
    small: str | None = None,
) -> dict[str, torch.Tensor]:
    """The weights as a file keeps them.

    ``scales`` ("scaled_fp8" or "weight_scale") quantises matrices with the scale of their largest
    element and adds the scales under ComfyUI's older or newer names. ``small`` is the dtype of
    everything that is no matrix, if another.
    """
    stored = {}
    for name, tensor in weights.items():
        if tensor.ndim != 2:
            stored[name] = tensor.to(TORCH_DTYPES[small or dtype])
            continue
        if scales is None:
            stored[name] = tensor.to(TORCH_DTYPES[dtype])
            continue
        scale = tensor.abs().max() / LARGEST[dtype]
        stored[name] = (tensor / scale).to(TORCH_DTYPES[dtype])
        layer = name.removesuffix(".weight")
        if scales == "scaled_fp8":
            stored[f"{layer}.scale_weight"] = scale
            stored[f"{layer}.scale_input"] = torch.tensor(1.0)
        else:
            stored[f"{layer}.weight_scale"] = scale
            stored[f"{layer}.input_scale"] = torch.tensor(1.0)
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if scales == "scaled_fp8":
        stored["scaled_fp8"] = torch.empty(0, dtype=TORCH_DTYPES[dtype])
    return stored


def write(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """A safetensors file of these tensors, each name behind ``prefix``."""
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, path)


def entries_of(flux: Flux, dtype: str = "BF16", *, scaled: bool = False) -> Entries:
    """Name → (dtype, shape), of a file that has no bytes."""
    entries: Entries = {}
    for name, shape in shapes_of(flux).items():
        fp8 = not dtype.startswith("F8") or not scaled or len(shape) == 2
        entries[name] = (dtype if fp8 else "BF16", shape)
        if scaled and len(shape) == 2:
            entries[f"{name.removesuffix('.weight')}.scale_weight"] = ("F32", ())
            entries[f"{name.removesuffix('.weight')}.scale_input"] = ("F32", ())
    if scaled:
        entries["scaled_fp8"] = (dtype, (0,))
    return entries


def detect(entries: Entries, prefix: str = "") -> FluxConfig:
    """What the package sees in a file with these entries."""
    specs = [
        TensorSpec(f"{prefix}{name}", dtype, list(shape))
        for name, (dtype, shape) in entries.items()
    ]
    return detect_flux(specs, "some.safetensors")


def write_hollow(path: Path, entries: Entries, prefix: str = "") -> int:
    """A file with this header whose weights are a hole, all zeros; the bytes of the weights."""
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        header[f"{prefix}{name}"] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return end


def map_file(path: Path, prefix: str = "") -> tuple[dict[str, torch.Tensor], torch.UntypedStorage]:
    """Views of a file's tensors that begin with ``prefix``, and the map they all lie in."""
    whole = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    views = {}
    for name, entry in header.items():
        if name.startswith(prefix) and name != "__metadata__":
            dtype = {**TORCH_DTYPES, "U8": torch.uint8}[entry["dtype"]]
            shape = torch.Size(entry["shape"])
            strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
            start = (8 + length + entry["data_offsets"][0]) // dtype.itemsize
            views[name.removeprefix(prefix)] = torch.empty(0, dtype=dtype).set_(
                whole, start, shape, strides
            )
    return views, whole
