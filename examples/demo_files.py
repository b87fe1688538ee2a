"""The demo's weights: random numbers under the names that ComfyUI's own files have."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.flux_layers import flux_layers
from xdit_sidecar.protocol.errors import BadFile
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

SEED = 2
_VERSION = "1"  # raise it to have the files written again
_DTYPES = {"F32": numpy.float32, "F16": numpy.float16}

Shapes = dict[str, list[int]]


class WeightsFile(NamedTuple):
    """A component's role and where its file lies."""

    role: str
    path: Path


def ensure_files(directory: Path) -> list[WeightsFile]:
    """The demo's files; written once (420 MB, a few seconds), afterwards only looked at.

    The last one is the transformer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    planned = [
        # FLUX's ae.safetensors with half of its channels.
        ("vae", "ae.safetensors", "F32", autoencoder_shapes(channels=64)),
        ("clip_l", "clip_l.safetensors", "F16", clip_l_shapes()),
        # Shapes of T5-XXL and FLUX.1, narrower and with fewer layers.
        ("t5", "t5xxl.safetensors", "F16", t5_shapes()),
        ("transformer", "flux1.safetensors", "F32", transformer_shapes()),
    ]
    files = []
    for number, (role, name, dtype, shapes) in enumerate(planned):
        path = directory / name
        if not _is_complete(path):
            _write(path, dtype, shapes, SEED + number)
        files.append(WeightsFile(role, path))
    return files


def autoencoder_shapes(
    channels: int = 128, latent: int = 16, multipliers: tuple[int, ...] = (1, 2, 4, 4)
) -> Shapes:
    """Names and shapes of an autoencoder in the LDM layout, as FLUX's file has them."""
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = [outputs, inputs, kernel, kernel]
        shapes[f"{name}.bias"] = [outputs]

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = [width]
        shapes[f"{name}.bias"] = [width]

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)

    def middle(side: str, width: int) -> None:
        block(f"{side}.mid.block_1", width, width)
        norm(f"{side}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", width, width, kernel=1)
        block(f"{side}.mid.block_2", width, width)

    last = len(multipliers) - 1
    width = channels
    conv("encoder.conv_in", 3, width)
    for level, multiplier in enumerate(multipliers):
        for number in range(2):
            block(f"encoder.down.{level}.block.{number}", width, channels * multiplier)
            width = channels * multiplier
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * latent)

    conv("decoder.conv_in", latent, width)
    middle("decoder", width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for number in range(3):
            block(f"decoder.up.{level}.block.{number}", width, channels * multiplier)
            width = channels * multiplier
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    return shapes


def clip_l_shapes(layers: int = 12, width: int = 768) -> Shapes:
    """Names and shapes of clip_l.safetensors: 123 million parameters in the Hugging Face layout."""
    shapes: Shapes = {
        "text_model.embeddings.position_embedding.weight": [77, width],
        "text_model.embeddings.token_embedding.weight": [49408, width],
    }
    for layer in range(layers):
        name = f"text_model.encoder.layers.{layer}"
        for part, (outputs, inputs) in {
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
            "self_attn.k_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "self_attn.q_proj": (width, width),
            "self_attn.v_proj": (width, width),
        }.items():
            shapes[f"{name}.{part}.weight"] = [outputs, inputs]
            shapes[f"{name}.{part}.bias"] = [outputs]
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{name}.{part}.weight"] = [width]
            shapes[f"{name}.{part}.bias"] = [width]
    shapes["text_model.final_layer_norm.weight"] = [width]
    shapes["text_model.final_layer_norm.bias"] = [width]
    return shapes


def t5_shapes(layers: int = 4, width: int = 256, heads: int = 4, mlp: int = 512) -> Shapes:
    """Names and shapes of a T5 encoder in the Hugging Face layout, T5-XXL's vocabulary."""
    shapes: Shapes = {"shared.weight": [32128, width]}
    for layer in range(layers):
        name = f"encoder.block.{layer}.layer"
        for part in ("q", "k", "v", "o"):
            shapes[f"{name}.0.SelfAttention.{part}.weight"] = [width, width]
        if layer == 0:
            shapes[f"{name}.0.SelfAttention.relative_attention_bias.weight"] = [32, heads]
        shapes[f"{name}.0.layer_norm.weight"] = [width]
        shapes[f"{name}.1.DenseReluDense.wi_0.weight"] = [mlp, width]
        shapes[f"{name}.1.DenseReluDense.wi_1.weight"] = [mlp, width]
        shapes[f"{name}.1.DenseReluDense.wo.weight"] = [width, mlp]
        shapes[f"{name}.1.layer_norm.weight"] = [width]
    shapes["encoder.final_layer_norm.weight"] = [width]
    return shapes


def transformer_shapes() -> Shapes:
    """Names and shapes of a small FLUX.1 dev in Black Forest Labs' layout."""
    small = FluxConfig(
        in_channels=64,
        out_channels=64,
        hidden_size=256,
        head_size=64,
        mlp_size=1024,
        double_blocks=2,
        single_blocks=4,
        context_width=256,
        pooled_width=768,
        guidance=True,
        dtypes=("F32",),
        scaled=False,
        prefix="",
        nbytes=0,
    )
    return {name: shape for layer in flux_layers(small) for name, shape in layer.shapes.items()}


def _is_complete(path: Path) -> bool:
    try:
        with SafetensorsFile.open(path) as file:
            return file.metadata.get("xdit_sidecar_demo") == _VERSION
    except BadFile:
        return False


def _write(path: Path, dtype: str, shapes: Mapping[str, list[int]], seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "xdit_sidecar_demo": _VERSION}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * numpy.dtype(_DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = numpy.random.default_rng(seed)
    # Under another name until it is whole: an interrupted demo starts over.
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in shapes.values():
                values = random.standard_normal(math.prod(shape), dtype=numpy.float32)
                values *= 0.02
                values.astype(_DTYPES[dtype], copy=False).tofile(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
