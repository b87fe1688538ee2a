"""A tiny CLIP-L and a tiny T5: random, never trained, and enough to tell ten words apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from xdit_sidecar.daemon.models.text_encoder_config import ClipConfig, T5Config
from xdit_sidecar.daemon.models.text_encoder_detection import detect_clip, detect_t5
from xdit_sidecar.daemon.models.text_encoder_layers import TextLayer, clip_layers, t5_layers
from xdit_sidecar.daemon.ranks.text_encoders.clip import build_clip
from xdit_sidecar.daemon.ranks.text_encoders.t5 import build_t5
from xdit_sidecar.daemon.tokenizers import Tokenizers
from xdit_sidecar.protocol.regions.views import describe_tensors

from .words import CLIP_VOCABULARY, T5_VOCABULARY

WIDTH = 32
_FILE = {"dtypes": ("F16",), "scaled": False, "prefix": "", "nbytes": 0}
# ComfyUI tells CLIP-L by its second layer.
_CLIP = ClipConfig(CLIP_VOCABULARY, positions=77, width=WIDTH, mlp_size=64, layers=2, **_FILE)
_T5 = T5Config(
    T5_VOCABULARY, WIDTH, heads=2, head_size=16, mlp_size=64, layers=1, buckets=32, **_FILE
)

Tensors = dict[str, Tensor]


class Text(NamedTuple):
    """What a transformer is told of N prompts.

    ``context`` (N, K, width) and ``repeats`` (N, K), how often each of its tokens comes: the
    padding, most of 256 tokens, is the same vector again and again. ``pooled`` (N, width).
    """

    context: Tensor
    repeats: Tensor
    pooled: Tensor

    def take(self, rows: Tensor) -> Text:
        """Some of the prompts, in this order."""
        return Text(self.context[rows], self.repeats[rows], self.pooled[rows])


def make_clip(seed: int) -> Tensors:
    """Tensors in Hugging Face's layout, fp16."""
    return {f"text_model.{name}": t for name, t in _random(clip_layers(_CLIP), seed).items()}


def make_t5(seed: int) -> Tensors:
    """Tensors in Hugging Face's layout, fp16."""
    tensors = _random(t5_layers(_T5), seed)
    # Without positions all padding becomes the same vector, which training makes use of.
    for name in tensors:
        if "relative_attention_bias" in name:
            tensors[name].zero_()
    return tensors


def encode(clip: Tensors, t5: Tensors, tokenizers: Tokenizers, prompts: Iterable[str]) -> Text:
    """What the ranks and ComfyUI make of each prompt."""
    prompts = list(prompts)
    clip_ids = torch.tensor([tokenizers.clip_l(text)[0] for text in prompts])
    t5_ids = torch.tensor([tokenizers.t5(text) for text in prompts])
    clip_encoder = build_clip(detect_clip(describe_tensors(clip), "clip_l"), clip)
    t5_encoder = build_t5(detect_t5(describe_tensors(t5), "t5"), t5)
    context = t5_encoder.encode(t5_ids)
    length = int((t5_ids != 0).sum(1).max()) + 1
    torch.testing.assert_close(context[:, length - 1], context[:, -1])
    repeats = torch.ones(len(prompts), length)
    repeats[:, -1] = context.shape[1] - length + 1
    return Text(context[:, :length], repeats, clip_encoder.encode(clip_ids).pooled)


def _random(layers: Iterable[TextLayer], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for name, shape in layer.shapes.items():
            tensor = torch.randn(shape, generator=generator)
            if name.endswith(".bias"):
                tensor.zero_()
            elif len(shape) == 1:
                tensor.fill_(1)
            elif layer.linear:
                tensor /= shape[1] ** 0.5
            tensors[name] = tensor.half()
    return tensors
