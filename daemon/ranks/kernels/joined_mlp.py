"""Attention and the activated MLP beside each other, as FLUX's single blocks project them out.

A compiler writes both by one kernel, which computes the activation everywhere and takes twice as
long as reading and writing does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import define_operator
from ..parallel.ulysses import unpack_copy
from . import plain
from .finding import find_kernels


def make_room(heads: Tensor, room: int) -> Tensor:
    """(B, S, H, D) → (B, S, H·D + room), of which the last are for :func:`activate_into`."""
    if not room:
        return heads.flatten(2, 3)
    joined: Tensor = torch.ops.xdit_sidecar.make_room(heads, room)
    return joined


def activate_into(joined: Tensor, inner: Tensor, start: int) -> None:
    """See `plain.activate_into`; (B, S, …) is contiguous."""
    torch.ops.xdit_sidecar.activate_into(joined, inner, start)


def _make_room(heads: Tensor, room: int) -> Tensor:
    return unpack_copy(heads.unsqueeze(0), room)


def _describe_room(heads: Tensor, room: int) -> Tensor:
    batch, count, number, size = heads.shape
    return heads.new_empty(batch, count, number * size + room)


def _activate_into(joined: Tensor, inner: Tensor, start: int) -> None:
    (find_kernels(joined) or plain).activate_into(joined, inner, start)


define_operator("make_room(Tensor heads, int room) -> Tensor", _make_room, _describe_room)
define_operator("activate_into(Tensor(a!) joined, Tensor inner, int start) -> ()", _activate_into)
