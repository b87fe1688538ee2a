"""Every layer of a FLUX.1 file, and which modules of diffusers' FluxTransformer2DModel it becomes.

Source names are those of Black Forest Labs' own files (github.com/black-forest-labs/flux), which
ComfyUI's users have; target names are diffusers' module names. The two differ in three ways:
BFL keeps query, key and value (in single blocks the first MLP layer, too) in one linear layer, one
below the other; diffusers has a layer each. BFL's last modulation gives shift, then scale;
diffusers' scale, then shift. The rest is other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .flux_config import FluxConfig

# Timesteps and guidance come in as sinusoids of this width.
SINUSOIDS = 256
# Beside a layer's weight in fp8 files: ComfyUI's first naming, and its newer one.
WEIGHT_SCALES = ("scale_weight", "weight_scale")
# Only for multiplying in fp8, or for ComfyUI's own loader: not needed where weights are cast.
UNUSED_LEAVES = ("scale_input", "input_scale", "comfy_quant")
FP8_MARKER = "scaled_fp8"


def published_name(name: str) -> str:
    """BFL's name of a tensor of a FLUX.1 file: newer ComfyUI saves the norms' scales as weights."""
    return f"{name[: -len('weight')]}scale" if name.endswith("_norm.weight") else name


class Target(NamedTuple):
    """A module of diffusers' model and how many rows of the source are its."""

    module: str
    rows: int


class FluxLayer(NamedTuple):
    """One layer of the file: linear (weight [rows, columns], bias [rows]) or norm (scale [rows]).

    ``targets`` in the order of their rows; ``columns`` None: a norm. ``swapped``: the two halves
    of the rows change places, the only case in which bytes must be copied.
    """

    source: str
    targets: tuple[Target, ...]
    columns: int | None
    swapped: bool = False

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return sum(target.rows for target in self.targets)

    @property
    def parameters(self) -> dict[str, str]:
        """What the file calls a parameter → what diffusers calls it."""
        return {"scale": "weight"} if self.columns is None else {"weight": "weight", "bias": "bias"}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Tensor name in the file (without prefix) → its shape."""
        if self.columns is None:
            return {f"{self.source}.scale": [self.rows]}
        return {
            f"{self.source}.weight": [self.rows, self.columns],
            f"{self.source}.bias": [self.rows],
        }


def flux_layers(config: FluxConfig) -> Iterator[FluxLayer]:
    """All layers that a file of this config has, each once."""
    yield from _frame(config)
    for block in range(config.double_blocks):
        for stream in _STREAMS:
            yield from _stream(config, block, stream)
    for block in range(config.single_blocks):
        yield from _single(config, block)


class _Stream(NamedTuple):
    """How diffusers names the image's and the text's half of a double block."""

    source: str
    modulation: str
    projections: tuple[str, str, str]
    norms: tuple[str, str]
    output: str
    mlp: str


_STREAMS = (
    _Stream("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    _Stream(
        "txt",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
        "to_add_out",
        "ff_context",
    ),
)


def _linear(source: str, target: str, rows: int, columns: int) -> FluxLayer:
    return FluxLayer(source, (Target(target, rows),), columns)


def _frame(config: FluxConfig) -> Iterator[FluxLayer]:
    """What comes before and after the blocks."""
    width = config.hidden_size
    embedders = {"time_in": ("timestep", SINUSOIDS), "vector_in": ("text", config.pooled_width)}
    if config.guidance:
        embedders["guidance_in"] = ("guidance", SINUSOIDS)
    for source, (name, columns) in embedders.items():
        target = f"time_text_embed.{name}_embedder"
        yield _linear(f"{source}.in_layer", f"{target}.linear_1", width, columns)
        yield _linear(f"{source}.out_layer", f"{target}.linear_2", width, width)
    yield _linear("img_in", "x_embedder", width, config.in_channels)
    yield _linear("txt_in", "context_embedder", width, config.context_width)
    yield FluxLayer(
        "final_layer.adaLN_modulation.1", (Target("norm_out.linear", 2 * width),), width, True
    )
    yield _linear("final_layer.linear", "proj_out", config.out_channels, width)


def _stream(config: FluxConfig, block: int, stream: _Stream) -> Iterator[FluxLayer]:
    width, mlp = config.hidden_size, config.mlp_size
    source = f"double_blocks.{block}.{stream.source}"
    target = f"transformer_blocks.{block}"
    yield _linear(f"{source}_mod.lin", f"{target}.{stream.modulation}.linear", 6 * width, width)
    projections = tuple(Target(f"{target}.attn.{name}", width) for name in stream.projections)
    yield FluxLayer(f"{source}_attn.qkv", projections, width)
    yield from _norms(config, f"{source}_attn.norm", f"{target}.attn", stream.norms)
    yield _linear(f"{source}_attn.proj", f"{target}.attn.{stream.output}", width, width)
    yield _linear(f"{source}_mlp.0", f"{target}.{stream.mlp}.net.0.proj", mlp, width)
    yield _linear(f"{source}_mlp.2", f"{target}.{stream.mlp}.net.2", width, mlp)


def _single(config: FluxConfig, block: int) -> Iterator[FluxLayer]:
    width, mlp = config.hidden_size, config.mlp_size
    source, target = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
    yield _linear(f"{source}.modulation.lin", f"{target}.norm.linear", 3 * width, width)
    parts = [Target(f"{target}.attn.{name}", width) for name in ("to_q", "to_k", "to_v")]
    yield FluxLayer(f"{source}.linear1", (*parts, Target(f"{target}.proj_mlp", mlp)), width)
    yield from _norms(config, f"{source}.norm", f"{target}.attn", ("norm_q", "norm_k"))
    yield _linear(f"{source}.linear2", f"{target}.proj_out", width, width + mlp)


def _norms(
    config: FluxConfig, source: str, target: str, names: tuple[str, str]
) -> Iterator[FluxLayer]:
    for part, name in zip(("query_norm", "key_norm"), names, strict=True):
        yield FluxLayer(f"{source}.{part}", (Target(f"{target}.{name}", config.head_size),), None)
