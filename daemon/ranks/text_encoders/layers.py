"""Layers of transformers' text models whose weights are cast to fp32 where they are used.

ComfyUI computes text encoders in fp32 whatever the file has; transformers would compute in the
dtype of the weights, and T5 overflows fp16. One difference is left: ComfyUI rounds fp32 files to
fp16 when it loads them, here their weights are used as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..casting import Twins, cast


class CastEmbedding(nn.Embedding):
    """A table [entries, width] of any floating dtype whose rows come out in fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """In the place of ``embedding``, whose weight it takes over."""
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices [...] to fp32 [..., width]."""
        if self.weight.itemsize > 1:
            return functional.embedding(input, self.weight).float()
        # Not every device can pick rows of fp8; of bytes they all can.
        rows = functional.embedding(input, self.weight.view(torch.uint8))
        # fp8 files of T5 have had NaNs in the rows of tokens that no text has.
        return rows.view(self.weight.dtype).float().nan_to_num()


class CastLayerNorm(nn.LayerNorm):
    """A layer norm whose weight and bias [size] have any floating dtype."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """In the place of ``norm``, whose parameters it takes over."""
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same, in the input's dtype."""
        weight, bias = cast(self.weight, input.dtype), cast(self.bias, input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class CastT5Norm(nn.Module):
    """T5's norm, which divides by the root mean square; its weight [size] has any dtype."""

    def __init__(self, norm: Any) -> None:
        """In the place of a ``T5LayerNorm``, whose weight it takes over."""
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [..., size] to the same."""
        variance = hidden.square().mean(-1, keepdim=True)
        normed: torch.Tensor = self.weight.to(hidden.dtype) * (
            hidden * torch.rsqrt(variance + self.eps)
        )
        return normed


class GatedMlp(nn.Module):
    """T5's MLP with gated GELU. transformers' own casts its input to the last weight's dtype."""

    def __init__(self, mlp: nn.Module) -> None:
        """In the place of a ``T5DenseGatedActDense``, whose layers it takes over."""
        super().__init__()
        self.wi_0 = mlp.get_submodule("wi_0")
        self.wi_1 = mlp.get_submodule("wi_1")
        self.wo = mlp.get_submodule("wo")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        gate = functional.gelu(self.wi_0(hidden), approximate="tanh")
        projected: torch.Tensor = self.wo(gate * self.wi_1(hidden))
        return projected


# T5's norm has a class of transformers' own and is added where T5 is built.
TWINS: Twins = {nn.Embedding: CastEmbedding, nn.LayerNorm: CastLayerNorm}
