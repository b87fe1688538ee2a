"""A FLUX that is small but whole, inputs for it, and an fp64 reference that is not our code."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

SHAPE = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
# Times 1000 these are whole numbers that bf16 holds: rounding them would hide all other errors.
SIGMAS = (0.5, 0.25, 1.0)
GUIDANCE = (4.0, 2.0, 1.0)


def make_model(dtype: torch.dtype, **shape: Any) -> FluxTransformer2DModel:
    """Equal weights in every process; large enough that attention matters for the output."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**SHAPE, **shape}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    # Rounded once, so that every dtype starts from the same weights.
    return model.to(torch.bfloat16).to(dtype)


def make_inputs(
    seed: int, image: int, text: int, rows: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Rows differ in every input, so that a row in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(torch.bfloat16).to(dtype)

    width = max(1, int(image**0.5))
    ids = torch.zeros(image, 3)
    ids[:, 1] = torch.arange(image) // width
    ids[:, 2] = torch.arange(image) % width
    return {
        "hidden_states": noise(rows, image, 16),
        "encoder_hidden_states": noise(rows, text, 32),
        "pooled_projections": noise(rows, 32),
        "timestep": torch.tensor([SIGMAS[row % 3] for row in range(rows)]),
        "img_ids": ids.to(dtype),
        "txt_ids": torch.zeros(text, 3, dtype=dtype),
        "guidance": torch.tensor([GUIDANCE[row % 3] for row in range(rows)]),
    }


def run_plain(model: FluxTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
    """One process, diffusers alone."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


class ReferenceAttention:
    """Softmax attention written out in fp64; diffusers rotates in fp32 whatever the dtype."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(tensor: Tensor) -> Tensor:
            return tensor.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], 2)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], 2)
            value = torch.cat([heads(attn.add_v_proj(text)), value], 2)
        assert image_rotary_emb is not None
        query, key = (self._rotate(tensor, *image_rotary_emb) for tensor in (query, key))
        weights = (query @ key.transpose(-1, -2) / attn.head_dim**0.5).softmax(-1)
        output = (weights @ value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](output[:, length:]), attn.to_add_out(output[:, :length])

    @staticmethod
    def _rotate(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        real, imaginary = tensor.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], -1).flatten(-2)
        return tensor * cosine.double() + turned * sine.double()


def make_reference() -> FluxTransformer2DModel:
    """The same model in fp64."""
    model = make_model(torch.float64)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(ReferenceAttention())
    return model


def root_mean_square(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


def digest(*tensors: Tensor) -> str:
    """Of the bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
