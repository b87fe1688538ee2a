"""A FLUX.1 file's tensors under the names of diffusers' FluxTransformer2DModel, as views.

Rows of a row-major matrix are contiguous, so whatever lies below each other in one tensor of the
file (query, key, value, MLP) becomes a tensor each without a copy. The table of names is
:mod:`...models.flux_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...models.flux_config import FluxConfig
from ...models.flux_layers import (
    FP8_MARKER,
    UNUSED_LEAVES,
    WEIGHT_SCALES,
    FluxLayer,
    flux_layers,
    published_name,
)
from ..casting import SCALE


class MappedWeights(NamedTuple):
    """``state``: parameter or scale of diffusers' model → tensor; ``copied``: those with bytes of
    their own; the others are views of the given tensors."""

    state: dict[str, torch.Tensor]
    copied: frozenset[str]

    @property
    def copied_bytes(self) -> int:
        """Bytes that exist once more than in the file."""
        return sum(self.state[name].nbytes for name in self.copied)

    @property
    def shared_bytes(self) -> int:
        """Bytes that exist once; a scale that three modules read counts three times."""
        return sum(tensor.nbytes for tensor in self.state.values()) - self.copied_bytes


def map_weights(config: FluxConfig, tensors: Mapping[str, torch.Tensor]) -> MappedWeights:
    """Every weight of the model that ``config`` describes, from tensors by their BFL names.

    ``tensors`` have names without prefix, any dtypes, the shapes of :func:`~.flux_layers`; scales
    of fp8 weights come out as 0-dimensional ``<module>.weight_scale``. Only final_layer's
    modulation is copied. Raises ValueError for a missing or an unknown tensor: nothing is skipped.
    """
    left = {published_name(name): tensor for name, tensor in tensors.items()}
    state: dict[str, torch.Tensor] = {}
    copied: set[str] = set()
    for layer in flux_layers(config):
        for leaf, parameter in layer.parameters.items():
            tensor = left.pop(f"{layer.source}.{leaf}", None)
            if tensor is None:
                raise ValueError(f"the tensor {layer.source}.{leaf} is missing")
            if layer.swapped:
                tensor = _swap_halves(tensor)
                copied.update(f"{target.module}.{parameter}" for target in layer.targets)
            parts = torch.split(tensor, [target.rows for target in layer.targets])
            for target, part in zip(layer.targets, parts, strict=True):
                state[f"{target.module}.{parameter}"] = part
        scale = _take_scale(layer, left)
        if scale is not None:
            state |= {f"{target.module}.{SCALE}": scale for target in layer.targets}
    left.pop(FP8_MARKER, None)
    if left:
        raise ValueError(f"the tensor {min(left)} is unknown ({len(left)} such)")
    return MappedWeights(state, frozenset(copied))


def _swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    # Not torch.cat, which fp8 has not on every device.
    swapped = torch.empty_like(tensor)
    for target, half in zip(swapped.chunk(2), reversed(tensor.chunk(2)), strict=True):
        target.copy_(half)
    return swapped


def _take_scale(layer: FluxLayer, left: dict[str, torch.Tensor]) -> torch.Tensor | None:
    for leaf in UNUSED_LEAVES:
        left.pop(f"{layer.source}.{leaf}", None)
    for leaf in WEIGHT_SCALES:
        scale = left.pop(f"{layer.source}.{leaf}", None)
        if scale is not None:
            return scale.reshape(())
    return None
