"""Between the latent of FLUX's VAE and the one that its transformer works on."""

from __future__ import annotations

from torch import Tensor

# From ae.safetensors' configuration: what makes encoded pictures' mean 0 and deviation 1.
SCALE = 0.3611
SHIFT = 0.1159


def to_model(latent: Tensor) -> Tensor:
    """(B, C, H, W) of the VAE to the same of the transformer."""
    return (latent - SHIFT) * SCALE


def to_vae(latent: Tensor) -> Tensor:
    """(B, C, H, W) of the transformer to the same of the VAE."""
    return latent / SCALE + SHIFT
