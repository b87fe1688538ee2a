"""transformers' CLIP text model around weights that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.text_encoder_config import ClipConfig
from ...models.text_encoder_layers import CLIP_UNUSED, clip_layers, clip_name
from .layers import TWINS
from .weights import check_tokens, load_weights, map_weights

_POSITIONS = "position_ids"


class ClipText(NamedTuple):
    """``hidden`` fp32 [batch, positions, width] and ``pooled`` fp32 [batch, width]."""

    hidden: torch.Tensor
    pooled: torch.Tensor


class ClipEncoder(NamedTuple):
    """A ``transformers.CLIPTextModel`` whose parameters are views of given tensors.

    ``shared_bytes`` lie in those tensors, ``cast_layers`` cast their weights to fp32 at use.
    """

    model: nn.Module
    config: ClipConfig
    shared_bytes: int
    cast_layers: int

    @torch.no_grad()
    def encode(self, token_ids: torch.Tensor) -> ClipText:
        """Tokens, int64 [batch, positions] on any device, to what FLUX.1 gets of them in ComfyUI.

        The last layer's states after the final norm, and of those the one at the first end token
        (without one: at the last token), not projected. Raises ValueError for tokens of another
        shape or dtype and for those that the vocabulary does not have.
        """
        check_tokens(token_ids, self.config.vocabulary)
        if token_ids.shape[1] != self.config.positions:
            raise ValueError(
                f"{token_ids.shape[1]} tokens: CLIP takes {self.config.positions}, pad or cut them"
            )
        tokens = token_ids.to(next(self.model.parameters()).device)
        hidden: torch.Tensor = self.model(input_ids=tokens).last_hidden_state
        ends = tokens == self.config.end_token
        # Not transformers' pooled state, which is the first token's where there is no end.
        last = torch.where(ends.any(1), ends.int().argmax(1), tokens.shape[1] - 1)
        return ClipText(hidden, hidden[torch.arange(len(tokens), device=tokens.device), last])


def build_clip(config: ClipConfig, tensors: Mapping[str, torch.Tensor]) -> ClipEncoder:
    """The encoder whose parameters are views of ``tensors``, by names without prefix.

    Any device and any of the file's dtypes; it computes in fp32. The tensors stay alive as long as
    the model. Raises ValueError for missing or unknown tensors, RuntimeError for shapes that
    differ from the config's.
    """
    state = map_weights(clip_layers(config), tensors, CLIP_UNUSED, clip_name)
    shared_bytes = sum(tensor.nbytes for tensor in state.values())
    model = _empty_clip(config)
    if hasattr(model, "text_model"):  # transformers before 5.6
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    device = next(iter(state.values())).device
    _number_positions(model, device)
    cast_layers = load_weights(model, state, TWINS)
    return ClipEncoder(model, config, shared_bytes, cast_layers)


def _number_positions(model: nn.Module, device: torch.device) -> None:
    """The one buffer that no file has; made on meta, it has no content."""
    for module in model.modules():
        buffer = module._buffers.get(_POSITIONS)
        if buffer is not None:
            numbers = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module._buffers[_POSITIONS] = numbers


def _empty_clip(config: ClipConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    arguments: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        # CLIP-L's; no tensor tells.
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": config.end_token,
        # Of no use to the model; the defaults are no tokens of a small vocabulary.
        "bos_token_id": None,
        "pad_token_id": None,
    }
    construct: Any = CLIPTextModel  # untyped
    with torch.device("meta"):
        model: nn.Module = construct(CLIPTextConfig(**arguments))
    return model
