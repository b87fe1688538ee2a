"""A model with guidance embedding, called without guidance.

ComfyUI's "FluxDisableGuidance" node does that, and its FLUX then leaves the embedding out.
diffusers has no such call, and no value of guidance embeds as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def allow_missing_guidance(model: nn.Module) -> None:
    """Have a FluxTransformer2DModel take ``guidance=None``, whether it embeds guidance or not.

    To be called once, after :func:`~.exact_times.keep_times_exact`. Calls with guidance stay as
    they are.
    """
    embedding = model.get_submodule("time_text_embed")
    if not hasattr(embedding, "guidance_embedder"):
        return
    switch = _Switch()
    embedding.register_forward_pre_hook(switch.fill_in)
    embedding.get_submodule("guidance_embedder").register_forward_hook(switch.leave_out)


class _Switch:
    """Whether the forward that is under way has guidance."""

    def __init__(self) -> None:
        self._missing = False

    def fill_in(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._missing = len(args) == 2
        if not self._missing:
            return None
        timestep, pooled = args
        return timestep, torch.zeros_like(timestep), pooled

    def leave_out(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return torch.zeros_like(output) if self._missing else output
