"""A VAE's layers with weights that are cast where they are used."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..casting import Twins, cast


class CastConv2d(nn.Conv2d):
    """A convolution for inputs of any floating dtype, whose parameters have any other."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """In the place of ``conv``, whose parameters it takes over."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # of two numbers
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[batch, in, height, width] to [batch, out, …], in the input's dtype."""
        weight, bias = self.weight.to(input.dtype), cast(self.bias, input.dtype)
        output: torch.Tensor = self._conv_forward(input, weight, bias)
        return output


class CastGroupNorm(nn.GroupNorm):
    """A group norm for inputs of any floating dtype, whose parameters have any other."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        """In the place of ``norm``, whose parameters it takes over."""
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[batch, channels, …] to the same, in the input's dtype."""
        weight, bias = cast(self.weight, input.dtype), cast(self.bias, input.dtype)
        return functional.group_norm(input, self.num_groups, weight, bias, self.eps)


TWINS: Twins = {nn.Conv2d: CastConv2d, nn.GroupNorm: CastGroupNorm}
