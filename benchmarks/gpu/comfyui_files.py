"""FLUX.1-dev, its text encoders and its VAE at full size, with random weights, as ComfyUI has them.

One block of normal numbers is written again and again: 34 GB take as long as the disk takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from demo_files import autoencoder_shapes, clip_l_shapes, t5_shapes
from flux_files import DEV, shapes_of

BLOCK_VALUES = 32 << 20
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
#: Folder and name below models/ → shapes, dtype, spread of the values.
FILES: dict[str, tuple[Mapping[str, Sequence[int]], str, float]] = {
    "diffusion_models/flux1-dev.safetensors": (shapes_of(DEV), "BF16", 0.02),
    "text_encoders/clip_l.safetensors": (clip_l_shapes(), "F16", 0.02),
    "text_encoders/t5xxl_fp16.safetensors": (
        t5_shapes(layers=24, width=4096, heads=64, mlp=10240),
        "F16",
        0.02,
    ),
    "vae/ae.safetensors": (autoencoder_shapes(), "F32", 0.02),
}


def write_models(models: Path) -> int:
    """All files below ``models``; the bytes of their weights."""
    total = 0
    for number, (name, (shapes, dtype, spread)) in enumerate(FILES.items()):
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        total += _write(path, shapes, dtype, spread, number)
    return total


def _write(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: str, spread: float, seed: int
) -> int:
    item = DTYPES[dtype].itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    count = min(BLOCK_VALUES, end // item)
    block = _bytes_of(torch.randn(count, generator=generator) * spread, dtype)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, end, len(block)):
            file.write(block[: end - done])
        for name, shape in shapes.items():
            if _is_norm(name):  # what scales: about one, or nothing comes out in the end
                place = header[name]["data_offsets"][0]  # type: ignore[index]
                os.pwrite(
                    file.fileno(),
                    _bytes_of(torch.ones(prod(shape)), dtype),
                    8 + len(text) + place,
                )
    return end


def _is_norm(name: str) -> bool:
    return name.endswith(".scale") or (
        name.endswith(".weight") and "norm" in name.split(".")[-2] and "embed" not in name
    )


def _bytes_of(tensor: torch.Tensor, dtype: str) -> memoryview:
    return memoryview(tensor.to(DTYPES[dtype]).view(torch.uint8).numpy())
