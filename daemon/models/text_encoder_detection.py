"""From the header of a safetensors file to the sizes of its text encoder, or to one clear sentence.

Nothing but names, dtypes and shapes is looked at. Every tensor is checked, so that a file which is
accepted here can be loaded strictly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...protocol.errors import UnsupportedModel
from ...protocol.manifest import TensorSpec
from ...protocol.safetensors_file import SafetensorsFile
from .component_tensors import ComponentTensors, find_prefix, shorten_label
from .flux_layers import WEIGHT_SCALES
from .text_encoder_config import ClipConfig, T5Config
from .text_encoder_layers import (
    CLIP_UNUSED,
    T5_UNUSED,
    TextLayer,
    clip_layers,
    clip_name,
    t5_layers,
)

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
# Before the tensors in whole checkpoints, and in what ComfyUI saves of a pair of encoders.
CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "clip_l.transformer.")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.")
_SUPPORTED = (
    "supported are FLUX.1's text encoders (CLIP-L and T5 version 1.1, as T5-XXL) in the layout of "
    "Hugging Face and ComfyUI, in fp32, fp16, bf16 or fp8 e4m3 (also scaled)"
)
# What names begin with.
_CLIP = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_T5 = ("shared.", "encoder.block.", "encoder.final_layer_norm.")
# CLIP-L has 12 layers. ComfyUI takes what has 23 for CLIP-H, and CLIP-H and -G have another
# activation, which no tensor tells.
_MOST_CLIP_LAYERS = 22
_OTHERS = (
    ("a VAE, not a text encoder", ("decoder.conv_in.", "first_stage_model.")),
    ("a FLUX.1 transformer, not a text encoder", ("double_blocks.", "single_blocks.")),
    ("a LoRA, not a text encoder", (".lora_A.", ".lora_B.", "lora_down.", "lora_up.")),
)
_OTHERS_THAN_CLIP = (
    ("CLIP in the layout of OpenCLIP", ("transformer.resblocks.",)),
    ("a whole CLIP with its image encoder: use a file of its text model", ("vision_model.",)),
    ("a language model, not CLIP", ("model.layers.", "input_layernorm")),
    *_OTHERS,
)
_OTHERS_THAN_T5 = (
    ("a whole T5 with its decoder: use a file of its encoder", ("decoder.block.",)),
    ("UMT5, Wan's text encoder", ("block.1.layer.0.SelfAttention.relative_attention_bias.",)),
    ("T5 version 1.0, without gated GELU", (".DenseReluDense.wi.",)),
    *_OTHERS,
)


def detect_text_encoder_file(file: SafetensorsFile) -> ClipConfig | T5Config:
    """The config of the text encoder in a file. Raises UnsupportedModel."""
    return detect_text_encoder([tensor.spec for tensor in file.tensors], file.label)


def detect_text_encoder(specs: Sequence[TensorSpec], label: str) -> ClipConfig | T5Config:
    """The config of the one text encoder whose tensors these are: of a file, or of a region.

    Where the names have a prefix of whole checkpoints, only those with it count. ``label`` names
    the file in errors. Raises :class:`~.errors.UnsupportedModel` for other models, incomplete
    files, unknown tensors, impossible shapes or dtypes, and for checkpoints that have both: there
    ask for one, with :func:`detect_clip` or :func:`detect_t5`.
    """
    clip = find_prefix(specs, CLIP_PREFIXES)
    t5 = find_prefix(specs, T5_PREFIXES)
    if clip and t5:
        raise UnsupportedModel(
            f"{shorten_label(label)} has two text encoders, CLIP ({clip}*) and T5 ({t5}*): "
            "hand them over one at a time"
        )
    if t5 or (not clip and any(spec.name.startswith(_T5) for spec in specs)):
        return detect_t5(specs, label)
    return detect_clip(specs, label)


def detect_clip(specs: Sequence[TensorSpec], label: str) -> ClipConfig:
    """The config of the CLIP text model among these tensors; errors as above."""
    found = ComponentTensors(
        specs,
        label,
        kind="a CLIP text encoder",
        supported=_SUPPORTED,
        prefixes=CLIP_PREFIXES,
        rename=clip_name,
    )
    found.recognise(_CLIP, _OTHERS_THAN_CLIP)
    vocabulary, width = found.shape("embeddings.token_embedding.weight", 2)
    layers = found.count("encoder.layers.")
    if layers > _MOST_CLIP_LAYERS:
        raise found.refusal(f"is CLIP-H or CLIP-G ({layers} layers), not CLIP-L")
    config = ClipConfig(
        vocabulary=vocabulary,
        positions=found.shape("embeddings.position_embedding.weight", 2)[0],
        width=width,
        mlp_size=found.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        layers=layers,
        dtypes=found.dtypes,
        scaled=_is_scaled(found),
        prefix=found.prefix,
        nbytes=found.nbytes,
    )
    _check(found, clip_layers(config), CLIP_UNUSED)
    return config


def detect_t5(specs: Sequence[TensorSpec], label: str) -> T5Config:
    """The config of the T5 encoder among these tensors; errors as above."""
    found = ComponentTensors(
        specs, label, kind="a T5 text encoder", supported=_SUPPORTED, prefixes=T5_PREFIXES
    )
    found.recognise(_T5, _OTHERS_THAN_T5)
    vocabulary, width = found.shape("shared.weight", 2)
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = found.shape(f"{attention}.relative_attention_bias.weight", 2)
    inner = found.shape(f"{attention}.q.weight", 2)[0]
    # Half of the buckets are for what comes before, and half of those for what is near.
    if inner % heads or buckets % 4:
        raise found.refusal(
            f"has attention of {inner} elements in {heads} heads, with {buckets} buckets of "
            "positions, which T5 cannot have"
        )
    config = T5Config(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_size=inner // heads,
        mlp_size=found.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        layers=found.count("encoder.block."),
        buckets=buckets,
        dtypes=found.dtypes,
        scaled=_is_scaled(found),
        prefix=found.prefix,
        nbytes=found.nbytes,
    )
    _check(found, t5_layers(config), T5_UNUSED)
    return config


def _is_scaled(found: ComponentTensors) -> bool:
    return any(name.rpartition(".")[2] in WEIGHT_SCALES for name in found.by_name)


def _check(found: ComponentTensors, layers: Iterable[TextLayer], unused: Sequence[str]) -> None:
    every = list(layers)
    shapes = {name: shape for layer in every for name, shape in layer.shapes.items()}
    found.check(shapes, WEIGHT_DTYPES)
    found.check_the_rest(shapes, unused, [layer.name for layer in every if layer.linear])
