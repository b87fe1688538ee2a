"""FLUX.1's layers with weights that are cast where they are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from ..casting import CastLinear, use_casting_twins

__all__ = ["CastLinear", "CastRMSNorm", "use_casts"]


class CastRMSNorm(nn.RMSNorm):
    """An RMS norm for inputs of any floating dtype, whose weight [size] has any other."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        """In the place of ``norm``, whose weight it takes over."""
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same, in the input's dtype."""
        weight = self.weight.to(x.dtype)
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)


def use_casts(
    model: nn.Module, state: Mapping[str, torch.Tensor], compute_dtype: torch.dtype
) -> int:
    """:func:`~..casting.use_casting_twins` with the kinds of layers that FLUX.1 has."""
    return use_casting_twins(model, state, compute_dtype, {nn.RMSNorm: CastRMSNorm})
