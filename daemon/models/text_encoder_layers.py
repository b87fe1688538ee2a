"""Every layer of a text encoder's file, under the names of transformers' modules.

The names are those of Hugging Face's CLIPTextModel and T5EncoderModel
(github.com/huggingface/transformers), which ComfyUI's files have, too. CLIP's are kept here
without ``text_model.``: files have it, transformers has dropped it from its modules in 5.6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .text_encoder_config import ClipConfig, T5Config

# In some files, and of no use for FLUX.1: the pooled text is not projected.
CLIP_UNUSED = (
    "text_projection.weight",
    "text_projection",
    "logit_scale",
    "embeddings.position_ids",
)
# A second name of shared.weight.
T5_UNUSED = ("encoder.embed_tokens.weight", "logit_scale")


class TextLayer(NamedTuple):
    """One module: ``weight``'s shape, and whether it has a bias of as many elements as rows.

    ``linear`` layers may have the scale of an fp8 weight beside them.
    """

    name: str
    weight: tuple[int, ...]
    bias: bool = False
    linear: bool = False

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Tensor name (without prefix) → its shape."""
        shapes = {f"{self.name}.weight": list(self.weight)}
        if self.bias:
            shapes[f"{self.name}.bias"] = [self.weight[0]]
        return shapes


def clip_name(name: str) -> str:
    """The name under which a CLIP tensor is known here."""
    return name.removeprefix("text_model.")


def clip_layers(config: ClipConfig) -> Iterator[TextLayer]:
    """All layers of a CLIP text model, each once."""
    width, mlp = config.width, config.mlp_size
    yield TextLayer("embeddings.token_embedding", (config.vocabulary, width))
    yield TextLayer("embeddings.position_embedding", (config.positions, width))
    for number in range(config.layers):
        layer = f"encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield TextLayer(f"{layer}.self_attn.{part}", (width, width), bias=True, linear=True)
        yield TextLayer(f"{layer}.mlp.fc1", (mlp, width), bias=True, linear=True)
        yield TextLayer(f"{layer}.mlp.fc2", (width, mlp), bias=True, linear=True)
        yield TextLayer(f"{layer}.layer_norm1", (width,), bias=True)
        yield TextLayer(f"{layer}.layer_norm2", (width,), bias=True)
    yield TextLayer("final_layer_norm", (width,), bias=True)


def t5_layers(config: T5Config) -> Iterator[TextLayer]:
    """All layers of a T5 encoder, each once."""
    width, inner, mlp = config.width, config.heads * config.head_size, config.mlp_size
    yield TextLayer("shared", (config.vocabulary, width))
    for number in range(config.layers):
        attention = f"encoder.block.{number}.layer.0"
        for part in "qkv":
            yield TextLayer(f"{attention}.SelfAttention.{part}", (inner, width), linear=True)
        yield TextLayer(f"{attention}.SelfAttention.o", (width, inner), linear=True)
        if number == 0:
            # The later blocks use the first one's.
            yield TextLayer(
                f"{attention}.SelfAttention.relative_attention_bias", (config.buckets, config.heads)
            )
        yield TextLayer(f"{attention}.layer_norm", (width,))
        mlps = f"encoder.block.{number}.layer.1"
        for part in ("wi_0", "wi_1"):
            yield TextLayer(f"{mlps}.DenseReluDense.{part}", (mlp, width), linear=True)
        yield TextLayer(f"{mlps}.DenseReluDense.wo", (width, mlp), linear=True)
        yield TextLayer(f"{mlps}.layer_norm", (width,))
    yield TextLayer("encoder.final_layer_norm", (width,))
