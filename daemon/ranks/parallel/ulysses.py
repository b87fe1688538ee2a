"""Attention of which each rank computes some heads, over the tokens of all ranks.

DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509) where every rank has as many tokens: what
xfuser's USP does, with fewer passes over the tokens, and in a form whose ends compiled code can
write and read by itself. B rows, S tokens of a rank, H heads of size D, P ranks; h = H / P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def pack(query: Tensor, key: Tensor, value: Tensor, ways: int) -> Tensor:
    """Three of (B, S, H, D) → (P, 3, B, S, h, D): by the rank that computes the heads."""
    together = torch.stack([query, key, value])
    three, batch, tokens, heads, size = together.shape
    by_rank = together.view(three, batch, tokens, ways, heads // ways, size)
    return by_rank.permute(3, 0, 1, 2, 4, 5).contiguous()


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pack` was given."""
    query, key, value = packed.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind(0)
    return query, key, value


def pack_output(output: Tensor, ways: int) -> Tensor:
    """(B, S, H, D) → (P, B, S, h, D)."""
    batch, tokens, heads, size = output.shape
    by_rank = output.reshape(batch, tokens, ways, heads // ways, size)
    return by_rank.permute(2, 0, 1, 3, 4).contiguous()


def unpack_output(packed: Tensor) -> Tensor:
    """(P, B, S, h, D) → (B, S, H, D)."""
    return packed.permute(1, 2, 0, 3, 4).flatten(2, 3)


def attend_by_heads(packed: Tensor, group: Any, attend: Attend) -> Tensor:
    """What :func:`pack` gives → what :func:`unpack_output` takes, of the rank's own tokens.

    ``attend`` is given, and gives, (B, P·S, h, D). All ranks of ``group`` call it with the same
    shapes. Raises RuntimeError if one stays away past the group's deadline.
    """
    ways, three, batch, tokens, heads, size = packed.shape
    all_tokens = exchange_shares(packed, group).permute(1, 2, 0, 3, 4, 5)
    query, key, value = all_tokens.reshape(three, batch, ways * tokens, heads, size).unbind(0)
    output = attend(query, key, value).reshape(batch, ways, tokens, heads, size)
    return exchange_shares(output.transpose(0, 1).contiguous(), group)


def exchange_shares(shares: Tensor, group: Any) -> Tensor:
    """(P, …): each rank is given one of the first dimension; from each comes one."""
    received = torch.empty_like(shares)
    dist.all_to_all_single(received, shares, group=group)
    return received
