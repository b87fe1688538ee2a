"""Queries and keys: norms of heads, rotation by position, and packing for the ranks, as one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import define_operator
from . import plain
from .finding import find_kernels
from .plain import Projected


def rotate_heads(
    image: Projected, text: Projected | None, rotation: tuple[Tensor, Tensor], ways: int, eps: float
) -> Tensor:
    """See `plain.rotate_heads`; text comes before the image, and ``ways`` divides the heads."""
    packed: Tensor = torch.ops.xdit_sidecar.rotate_heads(
        *image, *(text or (None, None)), *rotation, ways, eps
    )
    return packed


def _rotate_heads(
    image: Tensor,
    image_weight: Tensor,
    text: Tensor | None,
    text_weight: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    ways: int,
    eps: float,
) -> Tensor:
    streams = [Projected(image, image_weight)]
    if text is not None and text_weight is not None:
        streams.insert(0, Projected(text, text_weight))
    kernels = find_kernels(image) or plain
    packed: Tensor = kernels.rotate_heads(streams, cosines, sines, ways, eps)
    return packed


def _describe(
    image: Tensor,
    image_weight: Tensor,
    text: Tensor | None,
    text_weight: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    ways: int,
    eps: float,
) -> Tensor:
    batch, count, width = image.shape
    if text is not None:
        count = count + text.shape[1]
    (size,) = image_weight.shape
    return image.new_empty(ways, batch, count, width // size // ways, size)


define_operator(
    "rotate_heads(Tensor image, Tensor image_weight, Tensor? text, Tensor? text_weight,"
    " Tensor cosines, Tensor sines, int ways, float eps) -> Tensor",
    _rotate_heads,
    _describe,
)
