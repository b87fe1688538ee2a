"""Which parts of a latent are denoised, and which are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def fit_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """A noise mask, 1 where to denoise, for a latent of ``shape`` (B, C, H, W), in fp32.

    Given are (height, width), (rows, height, width) or (rows, 1, height, width) of any size: it is
    scaled bilinearly; missing rows are repeated, surplus ones dropped. Raises ValueError for other
    shapes.
    """
    if not 2 <= mask.ndim <= 4 or (mask.ndim == 4 and mask.shape[1] != 1) or not mask.numel():
        raise ValueError(
            f"a noise mask of shape {tuple(mask.shape)}: use (height, width), or "
            "(rows, height, width)"
        )
    rows = mask.float().reshape(-1, 1, *mask.shape[-2:])
    scaled = functional.interpolate(rows, size=shape[2:], mode="bilinear")
    count = -(-shape[0] // scaled.shape[0])
    return scaled.repeat(count, 1, 1, 1)[: shape[0]].expand(shape)
