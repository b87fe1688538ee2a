"""Pictures of unfinished latents at a glance: the best linear map from channels to colours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ...models.vae_config import LATENT_SCALE, LATENT_SHIFT
from .model import Vae

_SEED = 0
_SIDE = 8  # latent pixels
# Sides of the patches of one value, a latent each: pictures have areas and details.
_PATCHES = (1,) * 4 + (2,) * 8 + (4,) * 4


class LatentPreview(NamedTuple):
    """``weights`` [channels, 3] and ``bias`` [3], fp32 on the CPU: latent pixel to colour."""

    weights: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def fit(cls, vae: Vae) -> LatentPreview:
        """The map that is closest, in least squares, to what the VAE makes of random latents.

        Takes 16 decodes of 8 by 8 latent pixels, together the work of one of 32 by 32. The same
        for the same VAE on the same device.
        """
        channels = vae.config.latent_channels
        generator = torch.Generator().manual_seed(_SEED)
        latents = []
        for patch in _PATCHES:
            side = _SIDE // patch
            noise = torch.randn((1, channels, side, side), generator=generator)
            # As spread as FLUX.1's latents are.
            wide = noise.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
            latents.append(wide / LATENT_SCALE + LATENT_SHIFT)
        latent = torch.cat(latents)
        pictures = vae.decode(latent).movedim(3, 1)
        colours = functional.avg_pool2d(pictures, vae.config.ratio).cpu()
        # In fp64, so that the order of additions does not show in the result.
        points = _pixels(latent).double()
        points = torch.cat([points, torch.ones(len(points), 1, dtype=points.dtype)], dim=1)
        solution = torch.linalg.lstsq(points, _pixels(colours).double()).solution.float()
        return cls(solution[:-1], solution[-1])

    def preview(self, latent: torch.Tensor) -> torch.Tensor:
        """One latent [channels, h, w] or [1, channels, h, w] to uint8 [h, w, 3] on the CPU.

        A latent as a LATENT wire carries it. Raises ValueError for another shape.
        """
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        if latent.ndim != 3 or len(latent) != len(self.weights):
            raise ValueError(
                f"a latent of shape {list(latent.shape)}: one of [{len(self.weights)}, height, "
                "width] can be shown"
            )
        colours = latent.detach().float().cpu().movedim(0, 2) @ self.weights + self.bias
        return colours.nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)


def _pixels(planes: torch.Tensor) -> torch.Tensor:
    """[batch, channels, h, w] to [pixels, channels]."""
    return planes.movedim(1, 3).flatten(0, 2)
