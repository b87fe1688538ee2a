"""Text encoders' and VAEs' files in the layouts that ComfyUI reads, without the package under test.

Small and random: names, shapes and dtypes are those of the real files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from xdit_sidecar.protocol.manifest import TensorSpec

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.int64: "I64"}

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Clip:
    """A tiny CLIP text model; ComfyUI has its vocabulary built in."""

    width: int = 64
    layers: int = 2
    positions: int = 77
    vocabulary: int = 49408

    def shapes(self) -> Shapes:
        shapes: Shapes = {
            "text_model.embeddings.token_embedding.weight": (self.vocabulary, self.width),
            "text_model.embeddings.position_embedding.weight": (self.positions, self.width),
        }
        wide = 4 * self.width
        for layer in range(self.layers):
            name = f"text_model.encoder.layers.{layer}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= with_bias(f"{name}.self_attn.{part}", self.width, self.width)
            shapes |= with_bias(f"{name}.mlp.fc1", wide, self.width)
            shapes |= with_bias(f"{name}.mlp.fc2", self.width, wide)
            shapes |= with_bias(f"{name}.layer_norm1", self.width)
            shapes |= with_bias(f"{name}.layer_norm2", self.width)
        return shapes | with_bias("text_model.final_layer_norm", self.width)


@dataclass(frozen=True)
class T5:
    """A tiny T5 encoder whose heads together are not as wide as the model."""

    width: int = 48
    heads: int = 4
    head_size: int = 8
    mlp_size: int = 80
    layers: int = 3
    vocabulary: int = 120

    def shapes(self) -> Shapes:
        inner = self.heads * self.head_size
        shapes: Shapes = {"shared.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            name = f"encoder.block.{layer}.layer"
            for part in "qkv":
                shapes[f"{name}.0.SelfAttention.{part}.weight"] = (inner, self.width)
            shapes[f"{name}.0.SelfAttention.o.weight"] = (self.width, inner)
            if not layer:
                bias = f"{name}.0.SelfAttention.relative_attention_bias.weight"
                shapes[bias] = (32, self.heads)
            shapes[f"{name}.0.layer_norm.weight"] = (self.width,)
            for part in ("wi_0", "wi_1"):
                shapes[f"{name}.1.DenseReluDense.{part}.weight"] = (self.mlp_size, self.width)
            shapes[f"{name}.1.DenseReluDense.wo.weight"] = (self.width, self.mlp_size)
            shapes[f"{name}.1.layer_norm.weight"] = (self.width,)
        return shapes | {"encoder.final_layer_norm.weight": (self.width,)}


@dataclass(frozen=True)
class SmallVae:
    """An autoencoder with few channels."""

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    blocks: int = 1
    latent: int = 16

    @property
    def ratio(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    def shapes(self) -> Shapes:
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        last = len(widths) - 1
        shapes: Shapes = {}

        def block(name: str, columns: int, rows: int) -> None:
            shapes.update(with_bias(f"{name}.norm1", columns))
            shapes.update(with_bias(f"{name}.conv1", rows, columns, 3, 3))
            shapes.update(with_bias(f"{name}.norm2", rows))
            shapes.update(with_bias(f"{name}.conv2", rows, rows, 3, 3))
            if rows != columns:
                shapes.update(with_bias(f"{name}.nin_shortcut", rows, columns, 1, 1))

        def middle(half: str, width: int) -> None:
            block(f"{half}.mid.block_1", width, width)
            shapes.update(with_bias(f"{half}.mid.attn_1.norm", width))
            for part in ("q", "k", "v", "proj_out"):
                shapes.update(with_bias(f"{half}.mid.attn_1.{part}", width, width, 1, 1))
            block(f"{half}.mid.block_2", width, width)

        width = self.channels
        shapes |= with_bias("encoder.conv_in", width, 3, 3, 3)
        for level, rows in enumerate(widths):
            for number in range(self.blocks):
                block(f"encoder.down.{level}.block.{number}", width, rows)
                width = rows
            if level != last:
                shapes |= with_bias(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        middle("encoder", width)
        shapes |= with_bias("encoder.norm_out", width)
        shapes |= with_bias("encoder.conv_out", 2 * self.latent, width, 3, 3)
        shapes |= with_bias("decoder.conv_in", width, self.latent, 3, 3)
        middle("decoder", width)
        for level, rows in reversed(list(enumerate(widths))):
            for number in range(self.blocks + 1):
                block(f"decoder.up.{level}.block.{number}", width, rows)
                width = rows
            if level:
                shapes |= with_bias(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
        shapes |= with_bias("decoder.norm_out", width)
        return shapes | with_bias("decoder.conv_out", 3, width, 3, 3)


def with_bias(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """fp32 tensors that keep what goes through them at about 1; no two elements mean the same."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        inputs = tensor[0].numel()
        if len(shape) == 1:
            weights[name] = 0.1 * tensor if name.endswith(".bias") else 1 + 0.2 * tensor
        elif "embedding" in name or "relative" in name or name == "shared.weight":
            weights[name] = tensor
        else:
            weights[name] = tensor / inputs**0.5
    return weights


def store(weights: Tensors, dtype: str, *, scaled: bool = False) -> Tensors:
    """The weights as a file keeps them; ``scaled``: ComfyUI's scaled fp8, the rest in bf16.

    Linear layers' biases are then in fp8, too: this ComfyUI would round them anyway.
    """
    if not scaled:
        return {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    stored = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".bias") and weights[name.removesuffix("bias") + "weight"].ndim == 2:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            continue
        if tensor.ndim != 2 or "embedding" in name or "relative" in name or "shared" in name:
            stored[name] = tensor.bfloat16()
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.scale_weight"] = scale
        stored[f"{layer}.scale_input"] = torch.tensor(1.0)
    return stored


def specs_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """What a header says about these tensors."""
    return [TensorSpec(name, NAMES[t.dtype], list(t.shape)) for name, t in tensors.items()]


def hollow(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> list[TensorSpec]:
    """What a header says about a file of these shapes."""
    return [TensorSpec(name, dtype, list(shape)) for name, shape in shapes.items()]


def copies(tensors: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> int:
    """How many of ``tensors`` lie outside the storages of ``given``."""
    ranges = [
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        for storage in (tensor.untyped_storage() for tensor in given)
    ]
    return sum(
        not any(start <= tensor.data_ptr() < end for start, end in ranges) for tensor in tensors
    )
