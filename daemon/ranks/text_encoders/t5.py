"""transformers' T5 encoder around weights that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.text_encoder_config import T5Config
from ...models.text_encoder_layers import T5_UNUSED, t5_layers
from .layers import TWINS, CastT5Norm, GatedMlp
from .weights import check_tokens, load_weights, map_weights


class T5Encoder(NamedTuple):
    """A ``transformers.T5EncoderModel`` whose parameters are views of given tensors.

    ``shared_bytes`` lie in those tensors, ``cast_layers`` cast their weights to fp32 at use.
    """

    model: nn.Module
    config: T5Config
    shared_bytes: int
    cast_layers: int

    @torch.no_grad()
    def encode(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Tokens, int64 [batch, length] on any device, to fp32 [batch, length, width].

        Padding is attended to like text, as ComfyUI does it for FLUX.1. Raises ValueError for
        tokens of another shape or dtype and for those that the vocabulary does not have.
        """
        check_tokens(token_ids, self.config.vocabulary)
        tokens = token_ids.to(next(self.model.parameters()).device)
        hidden: torch.Tensor = self.model(input_ids=tokens).last_hidden_state
        return hidden


def build_t5(config: T5Config, tensors: Mapping[str, torch.Tensor]) -> T5Encoder:
    """The encoder whose parameters are views of ``tensors``, by names without prefix.

    Any device and any of the file's dtypes; it computes in fp32. The tensors stay alive as long as
    the model. Raises ValueError for missing or unknown tensors, RuntimeError for shapes that
    differ from the config's.
    """
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

    state = map_weights(t5_layers(config), tensors, T5_UNUSED)
    shared_bytes = sum(tensor.nbytes for tensor in state.values())
    # One table under two names.
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model = _empty_t5(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, T5DenseGatedActDense):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, GatedMlp(module))
    cast_layers = load_weights(model, state, {**TWINS, T5LayerNorm: CastT5Norm})
    return T5Encoder(model, config, shared_bytes, cast_layers)


def _empty_t5(config: T5Config) -> nn.Module:
    from transformers import T5Config as Config
    from transformers import T5EncoderModel

    arguments: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_size,
        "d_ff": config.mlp_size,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        # T5's; no tensor tells.
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }
    construct: Any = T5EncoderModel  # untyped
    with torch.device("meta"):
        model: nn.Module = construct(Config(**arguments))
    return model
