"""Timestep and guidance reach the model's embedding unrounded.

diffusers casts both to the activations' dtype before it multiplies them by 1000: in bf16 a
timestep of 730 becomes 728. ComfyUI embeds fp32 values, and every sampler counts on it: with the
rounding the output's error in bf16 was 16 times that of the arithmetic (tiny random model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PER_UNIT = 1000.0  # sigmas are 0 to 1, the embedding's timesteps 0 to 1000


def keep_times_exact(model: nn.Module) -> None:
    """Have a FluxTransformer2DModel embed ``timestep`` and ``guidance`` in fp32, as they are given.

    From then on it must be called with keywords, and both in fp32: [batch] each, guidance
    unscaled. Whoever calls ``model.time_text_embed`` itself must pass fp32 times 1000.
    """
    embedding = model.get_submodule("time_text_embed")
    times = _Times()
    model.register_forward_pre_hook(times.take, with_kwargs=True)
    embedding.register_forward_pre_hook(times.give)


class _Times:
    """What one forward was called with, on its way past diffusers' cast."""

    def __init__(self) -> None:
        self._waiting: list[torch.Tensor] | None = None

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "timestep" not in kwargs:
            raise TypeError("FLUX.1 must be called with keywords, timestep among them")
        given = (kwargs["timestep"], kwargs.get("guidance"))
        self._waiting = [time.float() * _PER_UNIT for time in given if time is not None]

    def give(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        if len(args) != len(waiting) + 1:
            raise RuntimeError(
                f"this version of diffusers embeds {len(args)} values where {len(waiting)} times "
                "and the pooled text were expected; use another version"
            )
        return (*waiting, args[-1])
