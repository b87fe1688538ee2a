"""A VAE file's tensors under the names of diffusers' AutoencoderKL, all of them views."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...models.vae_config import VaeConfig
from ...models.vae_layers import vae_layers


def map_weights(config: VaeConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight of the model that ``config`` describes, from tensors by names without prefix.

    Nothing is copied. Raises ValueError for a missing or an unknown tensor, RuntimeError for a
    1 by 1 convolution whose elements do not lie in a row.
    """
    left = dict(tensors)
    state: dict[str, torch.Tensor] = {}
    for layer in vae_layers(config):
        for leaf in ("weight", "bias"):
            tensor = left.pop(f"{layer.source}.{leaf}", None)
            if tensor is None:
                raise ValueError(f"the tensor {layer.source}.{leaf} is missing")
            if layer.linear and leaf == "weight":
                tensor = tensor.view(tensor.shape[0], tensor.shape[1])  # never a copy
            state[f"{layer.target}.{leaf}"] = tensor
    if left:
        raise ValueError(f"the tensor {min(left)} is unknown ({len(left)} such)")
    return state
