"""What the kernels compute, step by step with torch: for CPUs, and what kernels are compared with.

B rows, S tokens, H heads of size D, P ranks, h = H / P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from ..parallel.ulysses import pack


class Projected(NamedTuple):
    """Tokens of one stream as a layer gives them, and the weight of the norm that follows."""

    tokens: Tensor  # (B, S, H·D)
    weight: Tensor  # (D,), of the tokens' dtype


def rotate_heads(
    streams: Sequence[Projected], cosines: Tensor, sines: Tensor, ways: int, eps: float
) -> Tensor:
    """(P, B, S, h, D): heads of all streams, in their order, normed, rotated and packed.

    RMS norms and rotation as diffusers' ``FluxAttnProcessor`` has them. ``cosines`` and ``sines``:
    (S, D) in fp32, of the tokens of all streams.
    """
    normed = []
    for tokens, weight in streams:
        rows, count, width = tokens.shape
        heads = tokens.view(rows, count, width // weight.numel(), weight.numel())
        normed.append(functional.rms_norm(heads, weight.shape, weight, eps))
    rotated: Any = apply_rotary_emb(
        torch.cat(normed, dim=1),
        (cosines, sines),  # type: ignore[arg-type]  # its own annotation is wrong
        sequence_dim=1,
    )
    return pack(rotated, ways)


def activate_into(joined: Tensor, inner: Tensor, start: int) -> None:
    """GELU by tanh of (B, S, M), into (B, S, …) from column ``start`` on."""
    joined[..., start : start + inner.shape[-1]] = functional.gelu(inner, approximate="tanh")
