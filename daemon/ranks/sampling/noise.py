"""Noise that a seed stands for: the numbers that ComfyUI draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ComfyUI numbers the latents of a batch from 0; to reach a number, all before it are drawn.
LARGEST_BATCH_INDEX = 4095


def seeded_noise(
    shape: Sequence[int],
    seed: int,
    *,
    batch_index: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise of ``shape`` (B, C, H, W), on the CPU, which is where every device's comes from.

    A generator of its own: torch's global one is neither read nor changed, and the numbers are
    those that it would give after ``torch.manual_seed(seed)``. ``batch_index`` (B numbers) gives
    each row the noise that a larger batch, drawn row by row, has at that index: "Latent From Batch"
    in ComfyUI.

    Raises ValueError for a seed outside of torch's range (-2^63 to 2^64 - 1) or a batch index that
    does not fit.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is out of range: use 0 to 2^64 - 1")
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)
    if len(batch_index) != shape[0] or not batch_index:
        raise ValueError(f"{len(batch_index)} batch indices for {shape[0]} latents: give one each")
    if not 0 <= min(batch_index) <= max(batch_index) <= LARGEST_BATCH_INDEX:
        raise ValueError(
            f"batch indices {min(batch_index)} to {max(batch_index)}: "
            f"use 0 to {LARGEST_BATCH_INDEX}"
        )
    wanted = set(batch_index)
    rows: dict[int, Tensor] = {}
    for index in range(max(wanted) + 1):
        row = torch.randn((1, *shape[1:]), generator=generator, dtype=dtype)
        if index in wanted:
            rows[index] = row
    return torch.cat([rows[index] for index in batch_index])
