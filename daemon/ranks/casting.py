"""Layers whose weights stay in the dtype of the file and are cast where they are used.

The shared bytes are read as they are; at most one layer's weights exist in the compute dtype at a
time. The numbers are those of ComfyUI's cast-at-use: parameters take the input's dtype, and an fp8
weight is multiplied, in that dtype, with its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# What CastLinear calls the scale of an fp8 weight.
SCALE = "weight_scale"

# Kind of layer → what makes its casting twin.
Twins = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


class CastLinear(nn.Linear):
    """A linear layer for inputs of any floating dtype: weight [out, in], bias [out] of any other.

    With a ``weight_scale`` (0-dimensional) it computes ``x @ (weight.to(x) * scale.to(x)).T +
    bias.to(x)``.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch's own annotation is too narrow
    weight_scale: torch.Tensor | None

    def __init__(self, linear: nn.Linear, *, scaled: bool) -> None:
        """In the place of ``linear``, whose parameters it takes over."""
        # On meta: not even for a moment are there two weights.
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_buffer(SCALE, torch.empty((), device="meta") if scaled else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in the input's dtype."""
        scale = self.weight_scale
        # With a scale always a copy: what is multiplied in place must not be the shared bytes.
        weight = self.weight.to(input.dtype, copy=scale is not None)
        if scale is not None:
            weight.mul_(scale.to(input.dtype))
        return functional.linear(input, weight, cast(self.bias, input.dtype))


def cast(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A parameter that may be absent, in another dtype."""
    return None if parameter is None else parameter.to(dtype)


def use_casting_twins(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    compute_dtype: torch.dtype,
    twins: Twins,
) -> int:
    """Put a casting layer wherever ``state`` holds something else than ``compute_dtype``.

    Linear layers become :class:`CastLinear`, others what ``twins`` makes of them. To be called
    before the state is loaded. Returns the number of layers put in; those that need no cast stay
    as they are. Raises TypeError for a layer of a kind that has no casting twin.
    """
    needing: dict[str, bool] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if parameter == SCALE or tensor.dtype != compute_dtype:
            needing[module] = needing.get(module, False) or parameter == SCALE
    for name, scaled in needing.items():
        parent, _, own = name.rpartition(".")
        twin = _casting_twin(name, model.get_submodule(name), scaled, twins)
        setattr(model.get_submodule(parent), own, twin)
    return len(needing)


def _casting_twin(name: str, layer: nn.Module, scaled: bool, twins: Twins) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return CastLinear(layer, scaled=scaled)
    if not scaled:
        for kind, make in twins.items():
            if isinstance(layer, kind):
                return make(layer)
    raise TypeError(f"{name}, a {type(layer).__name__}, cannot cast its weights at use")
