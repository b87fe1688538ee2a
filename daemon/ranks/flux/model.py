"""diffusers' FLUX.1 transformer around weights that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.flux_config import FluxConfig
from .casting import use_casts
from .exact_times import keep_times_exact
from .weights import map_weights

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class LoadedFlux(NamedTuple):
    """A ``diffusers.FluxTransformer2DModel`` in evaluation mode, and what it cost.

    Called with keywords: tokens, context and pooled text in ``compute_dtype`` (``model.dtype`` may
    be that of some fp8 weight), timestep and guidance in fp32, guidance exactly if
    ``config.guidance``. ``copied_bytes`` are memory of its own, ``shared_bytes`` lie in the given
    tensors, ``cast_layers`` cast their weights at use.
    """

    model: nn.Module
    config: FluxConfig
    compute_dtype: torch.dtype
    copied_bytes: int
    shared_bytes: int
    cast_layers: int


def build_flux(
    config: FluxConfig, tensors: Mapping[str, torch.Tensor], compute_dtype: torch.dtype
) -> LoadedFlux:
    """The model whose parameters are views of ``tensors`` (by BFL name, without prefix).

    Any device and any of the file's dtypes; layers that are stored in ``compute_dtype`` (fp32, fp16
    or bf16) are used as they are, the others cast at use. No parameter requires a gradient, and
    the tensors stay alive as long as the model. Raises ValueError for another compute dtype and
    for missing or unknown tensors, RuntimeError for shapes that differ from the config's.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"FLUX.1 cannot compute in {compute_dtype}")
    mapped = map_weights(config, tensors)
    model = empty_flux(config)
    cast_layers = use_casts(model, mapped.state, compute_dtype)
    # Before the tensors come in: assigning keeps the flag, and fp8 could not have it.
    model.requires_grad_(False)
    model.load_state_dict(mapped.state, strict=True, assign=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"this version of diffusers gives FLUX.1 a tensor that no file has: {name}"
            )
    keep_times_exact(model)
    return LoadedFlux(
        model.eval(), config, compute_dtype, mapped.copied_bytes, mapped.shared_bytes, cast_layers
    )


def empty_flux(config: FluxConfig) -> nn.Module:
    """The same model on torch's meta device: all modules, no bytes."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    arguments: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.head_size,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": config.rope_axes,
    }
    construct: Any = FluxTransformer2DModel  # untyped
    with torch.device("meta"):
        model: nn.Module = construct(**arguments)
    return model
