"""FLUX's single blocks, with their MLP computed while attention's output is on its way."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor

from ..kernels.joined_mlp import activate_into
from .attention import LocalExchange, begin_attention

_LARGEST_FP16 = 65504


class OverlappingSingleBlock(FluxSingleTransformerBlock):
    """What diffusers' block computes, bit for bit, in an order that lets exchanges overlap.

    An existing block becomes one by its class; it has nothing more. Attention does not pass through
    the processor.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, L, D), text tokens (B, T, D), conditioning (B, D) → text, image."""
        exchange = (joint_attention_kwargs or {}).get("exchange") or LocalExchange()
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(tokens, emb=temb)
        begun = begin_attention(self.attn, normed, None, image_rotary_emb, exchange)
        mlp = self.proj_mlp(normed)
        joined = exchange.finish(begun, after=mlp, room=mlp.shape[2]).to(normed.dtype)
        activate_into(joined, mlp, joined.shape[2] - mlp.shape[2])
        change = self.proj_out(joined)
        tokens = tokens + gate.unsqueeze(1) * change
        if tokens.dtype == torch.float16:
            tokens = tokens.clip(-_LARGEST_FP16, _LARGEST_FP16)
        text = encoder_hidden_states.shape[1]
        return tokens[:, :text], tokens[:, text:]
