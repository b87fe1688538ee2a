"""The smallest FLUX.1 files that ComfyUI's stock loaders take: random, from seeds, 6 GB.

ComfyUI 0.3.75 has the width of the transformer (3072) and all sizes of T5-XXL, CLIP-L and the
autoencoder built in; only the number of blocks is free. Never committed, and not kept.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import flux_files
import torch
from ranks.components.component_files import T5, Clip, SmallVae

_FLUX = flux_files.Flux(
    heads=24,
    head_size=128,
    double=1,
    single=0,
    context=4096,
    pooled=768,
    channels=64,
    inputs=64,
    guidance=False,
)
_T5 = T5(4096, heads=64, head_size=64, mlp_size=10240, layers=24, vocabulary=32128)
# Random numbers, used again and again from other places; no width divides this.
_POOL = 4_000_037

DIFFUSION_MODEL = "stock-flux.safetensors"
CLIP_L = "stock-clip_l.safetensors"
T5XXL = "stock-t5xxl_fp8.safetensors"
AUTOENCODER = "stock-ae.safetensors"
#: Below models/: file → shapes, and the dtype in which it is usually found.
_FILES = {
    f"diffusion_models/{DIFFUSION_MODEL}": (flux_files.shapes_of(_FLUX), "BF16"),
    f"text_encoders/{CLIP_L}": (Clip(width=768, layers=12).shapes(), "F16"),
    f"text_encoders/{T5XXL}": (_T5.shapes(), "F8_E4M3"),
    f"vae/{AUTOENCODER}": (SmallVae(128, (1, 2, 4, 4), blocks=2).shapes(), "BF16"),
}


def install(base: Path) -> dict[str, int]:
    """Write the files into models/ of a base directory; their sizes in bytes."""
    sizes = {}
    for seed, (name, (shapes, dtype)) in enumerate(_FILES.items()):
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, shapes, dtype, seed)
        sizes[path.name] = path.stat().st_size
    return sizes


def _write(path: Path, shapes: flux_files.Shapes, dtype: str, seed: int) -> None:
    """Piece by piece: T5 alone is 4.8 GB, and random numbers take longer than writing."""
    end = flux_files.write_hollow(path, {name: (dtype, shape) for name, shape in shapes.items()})
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - end)
        for number, (name, shape) in enumerate(shapes.items()):
            left = prod(shape)
            numbers = _like_weights(name, shape, pool.roll(number * 7919)[:left])
            piece = numbers.to(flux_files.TORCH_DTYPES[dtype]).view(torch.uint8).numpy()
            left *= flux_files.ITEM_BYTES[dtype]
            while left:
                left -= file.write(piece[:left].data)


def _like_weights(name: str, shape: tuple[int, ...], numbers: torch.Tensor) -> torch.Tensor:
    """Such that what goes through a tensor of this name and shape stays at about 1."""
    if name.endswith(".bias"):
        return 0.1 * numbers
    if len(shape) == 1:
        return 1 + 0.2 * numbers
    if "embedding" in name or "relative" in name or name == "shared.weight":
        return numbers
    return numbers / prod(shape[1:]) ** 0.5
