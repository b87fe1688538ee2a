"""Sizes that ComfyUI has built in come from the tensors instead, as long as they differ.

A wrapper around each function that looks at a file; files of the real sizes go through unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.text_encoders.sd3_clip
import torch

_WIDTH_OF_FLUX = 3072
_WIDTH_OF_CLIP_L = 768
_WIDTH_OF_T5_XXL = 4096
_CHANNELS_OF_VAE = 128

Tensors = Mapping[str, torch.Tensor]


def accept() -> None:
    """From here on, the loaders of this process take tiny files, too."""
    comfy.model_detection.detect_unet_config = _detecting(comfy.model_detection.detect_unet_config)
    comfy.sd.load_text_encoder_state_dicts = _encoding(comfy.sd.load_text_encoder_state_dicts)
    comfy.sd.detect_te_model = _naming(comfy.sd.detect_te_model)
    comfy.sd.t5xxl_detect = _finding_t5(comfy.sd.t5xxl_detect)
    comfy.sd.load_state_dict_guess_config = _guessing(comfy.sd.load_state_dict_guess_config)
    comfy.sd.VAE.__init__ = _decoding(comfy.sd.VAE.__init__)


def _detecting(original: Any) -> Any:
    def detect_unet_config(state_dict: Tensors, key_prefix: str, metadata: Any = None) -> Any:
        found = original(state_dict, key_prefix, metadata=metadata)
        if not found or found.get("image_model") != "flux":
            return found
        if found["hidden_size"] != _WIDTH_OF_FLUX:
            norm = f"{key_prefix}double_blocks.0.img_attn.norm.query_norm.scale"
            head = state_dict[norm].shape[0]
            side = head * 7 // 32 * 2
            found["num_heads"] = found["hidden_size"] // head
            found["axes_dim"] = [head - 2 * side, side, side]
        return found

    return detect_unet_config


def _encoding(original: Any) -> Any:
    def load_text_encoder_state_dicts(
        state_dicts: Any = (), *arguments: Any, model_options: Any = None, **others: Any
    ) -> Any:
        options = {**(model_options or {})}
        for tensors in state_dicts:
            options |= _sizes_of_encoders(tensors, "", "")
        return original(state_dicts, *arguments, model_options=options, **others)

    return load_text_encoder_state_dicts


def _naming(original: Any) -> Any:
    def detect_te_model(sd: Tensors) -> Any:
        return comfy.sd.TEModel.T5_XXL if _is_tiny_t5(sd) else original(sd)

    return detect_te_model


def _finding_t5(original: Any) -> Any:
    """How T5-XXL is stored is looked for in its last layer, the 24th."""

    def t5xxl_detect(clip_data: Any) -> Any:
        for tensors in filter(_is_tiny_t5, clip_data):
            return comfy.text_encoders.sd3_clip.t5_xxl_detect(tensors)
        return original(clip_data)

    return t5xxl_detect


def _is_tiny_t5(tensors: Tensors) -> bool:
    words = tensors.get("shared.weight")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in tensors
    return gated and words is not None and words.shape[1] < _WIDTH_OF_T5_XXL


def _guessing(original: Any) -> Any:
    def load_state_dict_guess_config(
        sd: Tensors, *arguments: Any, te_model_options: Any = None, **others: Any
    ) -> Any:
        clip, t5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "t5xxl"))
        options = {**(te_model_options or {}), **_sizes_of_encoders(sd, clip, t5)}
        return original(sd, *arguments, te_model_options=options, **others)

    return load_state_dict_guess_config


def _decoding(original: Any) -> Any:
    def construct(self: Any, sd: Any = None, *arguments: Any, **others: Any) -> None:
        if sd is None or not (sizes := _sizes_of_vae(sd)):
            original(self, sd, *arguments, **others)
            return
        engine = comfy.sd.AutoencodingEngine

        def small_engine(**configs: Any) -> Any:
            for half in ("encoder_config", "decoder_config"):
                configs[half]["params"].update(sizes)
            return engine(**configs)

        comfy.sd.AutoencodingEngine = small_engine
        try:
            original(self, sd, *arguments, **others)
        finally:
            comfy.sd.AutoencodingEngine = engine

    return construct


def _sizes_of_encoders(tensors: Tensors, clip: str, t5: str) -> dict[str, Any]:
    """``model_options`` of a CLIP-L or T5 below these prefixes, unless it has the usual size."""
    options: dict[str, Any] = {}
    words = tensors.get(f"{clip}text_model.embeddings.token_embedding.weight")
    if words is not None and words.shape[1] < _WIDTH_OF_CLIP_L:
        width = words.shape[1]
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": _count(tensors, f"{clip}text_model.encoder.layers."),
            # No tensor tells: heads of 64, and where that does not fit, a few of them.
            "num_attention_heads": _heads_of_clip(width),
            "intermediate_size": tensors[f"{clip}text_model.encoder.layers.0.mlp.fc1.weight"].shape[
                0
            ],
        }
        # Loading a file of its own replaces the second by the first.
        options["model_config"] = options["clip_l_model_config"] = sizes
    words = tensors.get(f"{t5}shared.weight")
    if words is not None and words.shape[1] < _WIDTH_OF_T5_XXL:
        layer = f"{t5}encoder.block.0.layer"
        heads = tensors[f"{layer}.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        options["t5xxl_model_config"] = {
            "d_model": words.shape[1],
            "num_layers": _count(tensors, f"{t5}encoder.block."),
            "num_heads": heads,
            "d_kv": tensors[f"{layer}.0.SelfAttention.q.weight"].shape[0] // heads,
            "vocab_size": words.shape[0],
            "d_ff": tensors[f"{layer}.1.DenseReluDense.wi_0.weight"].shape[0],
        }
    return options


def _heads_of_clip(width: int) -> int:
    most = max(1, width // 64)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def _sizes_of_vae(tensors: Tensors) -> dict[str, Any]:
    """Settings of ComfyUI's encoder and decoder, unless the file has the usual ones."""
    first = tensors.get("encoder.conv_in.weight")
    if first is None or first.ndim != 4 or first.shape[0] == _CHANNELS_OF_VAE:
        return {}
    levels = _count(tensors, "encoder.down.")
    widths = [
        tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
    ]
    return {
        "ch": first.shape[0],
        "ch_mult": [width // first.shape[0] for width in widths],
        "num_res_blocks": _count(tensors, "encoder.down.0.block."),
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow the prefix: one more than the largest."""
    return 1 + max(_numbers(tensors, prefix))


def _numbers(tensors: Tensors, prefix: str) -> Iterator[int]:
    for name in tensors:
        if name.startswith(prefix):
            yield int(name[len(prefix) :].split(".", 1)[0])
