"""How many bytes a model needs on a GPU, before anything is allocated.

Activations are an upper estimate from the sizes alone: a test compares it with what diffusers'
forward really allocates. The other numbers say where they come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ...protocol.manifest import TensorSpec, lay_out, region_bytes
from ..ranks.parallel.config import ParallelConfig
from .flux_config import FluxConfig
from .flux_layers import flux_layers
from .vae_config import VaeConfig

_MIB = 1 << 20
# Measured on an H200, less on smaller cards: the driver alone, as the keeper has it.
KEEPER_CONTEXT = 523 * _MIB
# 620 MiB were measured for a bare context of torch; libraries' workspaces and NCCL's buffers, which
# grow with the ranks, make it about this much. An estimate.
RANK_CONTEXT = 1024 * _MIB

# A token is 2 by 2 latent pixels of 8 by 8 pixels.
TOKEN_PIXELS = 16

# FLUX.1's companions, as ComfyUI's users have them: parameters, in 16 bits.
_T5_XXL = 4_762_310_656
_CLIP_L = 123_060_480
_COMPANION_BYTES = 2
_T5_WIDTH, _CLIP_WIDTH = 4096, 768
VAE = VaeConfig((128, 256, 512, 512), 2, 16, ("BF16",), "", 83_819_683 * _COMPANION_BYTES)

_FP32 = 4
_ROPE_TABLES = 2  # cosine and sine


class Activations(NamedTuple):
    """The terms of one forward's activations on one rank, in bytes.

    ``frame`` lives for the whole forward: rotation tables, inputs and the prediction, modulations.
    ``block`` is the most that one block holds at a time beside it, ``attention`` what a kernel
    that writes the scores out adds, ``exchange`` the buffers between ranks, ``cast`` the one layer
    whose weights exist in the compute dtype as well.
    """

    frame: int
    block: int
    attention: int
    exchange: int
    cast: int


def forward_bytes(
    config: FluxConfig,
    *,
    tokens_image: int,
    tokens_text: int,
    rows: int,
    degrees: ParallelConfig,
    compute_item_bytes: int,
    cast_at_use: bool = False,
    fused_attention: bool = True,
) -> int:
    """Bytes that one rank allocates at most during one forward, weights left out. An estimate.

    ``tokens_image``, ``tokens_text`` and ``rows`` are those of the whole request,
    ``compute_item_bytes`` 2 or 4. ``cast_at_use``: weights are stored in another dtype (fp8).
    ``fused_attention=False``: the scores are written out, as torch's math kernel does.
    """
    return sum(
        activations(
            config,
            tokens_image=tokens_image,
            tokens_text=tokens_text,
            rows=rows,
            degrees=degrees,
            compute_item_bytes=compute_item_bytes,
            cast_at_use=cast_at_use,
            fused_attention=fused_attention,
        )
    )


def activations(
    config: FluxConfig,
    *,
    tokens_image: int,
    tokens_text: int,
    rows: int,
    degrees: ParallelConfig,
    compute_item_bytes: int,
    cast_at_use: bool,
    fused_attention: bool,
) -> Activations:
    """The terms of :func:`forward_bytes`."""
    item = compute_item_bytes
    own_rows = -(-rows // degrees.cfg)
    # Exact parallelism: what the ranks cannot share evenly, each of them works on.
    image, text = (sum(divmod(n, degrees.sequence)) for n in (tokens_image, tokens_text))
    tokens = image + text
    # One tensor of all tokens here, in the model's width.
    stream = own_rows * tokens * config.hidden_size * item
    widened = own_rows * tokens * config.hidden_size * _FP32
    # Rotating a query, or an RMS norm: the turned copy, and three fp32 tensors.
    scratch = stream + 3 * widened
    mlp = stream * config.mlp_size // config.hidden_size
    # A double block while it attends: tokens, their norms, projections, and q, k and v joined.
    double = (2 + 3 + 3) * stream + scratch
    # A double block's MLP: tokens, norms, attention's output, before and after the activation.
    double_mlp = (2 + 2) * stream + 2 * mlp + stream
    # A single block while it attends has its MLP's output waiting, and its input twice.
    single = (3 + 3 + 3) * stream + mlp + scratch
    # Then attention and MLP side by side (5 times the width), projected and gated.
    single_out = (3 + 1 + 2) * stream + mlp + (stream + mlp)
    blocks = [double, double_mlp] if config.double_blocks else []
    blocks += [single, single_out] if config.single_blocks else []
    # Packed qkv before, under way and after, the output the same way; places for four of them where
    # copy engines exchange, rounded up; k and v of a ring, and its sum in fp32.
    exchange = 0
    if degrees.sequence > 1:
        exchange = (3 * 3 + 2) * stream
    if degrees.ring > 1:
        exchange += 4 * stream + 2 * widened
    elif degrees.ulysses > 1:
        exchange += 5 * stream
    # Scores and their softmax in fp32, and scaled queries and keys.
    attention = 0
    if not fused_attention:
        heads = -(-config.heads // degrees.ulysses)
        keys = -(-tokens * degrees.sequence // degrees.ring)
        attention = 2 * own_rows * heads * keys * keys * _FP32 + 4 * widened
    return Activations(
        frame=_frame(config, rows, own_rows, tokens_image, tokens_text, tokens, item),
        block=max(blocks, default=0),
        attention=attention,
        exchange=exchange,
        cast=_largest_matrix(config) * item if cast_at_use else 0,
    )


def _frame(
    config: FluxConfig, rows: int, own_rows: int, image: int, text: int, tokens: int, item: int
) -> int:
    tables = _ROPE_TABLES * tokens * config.head_size * _FP32
    channels = config.in_channels + 2 * config.out_channels  # the prediction, gathered, too
    inputs = rows * item * (image * channels + text * config.context_width + config.pooled_width)
    positions = 3 * _FP32 * (image + text)
    # Both streams' six shifts, scales and gates, their sources, and one set more.
    modulations = 20 * own_rows * config.hidden_size * max(item, _FP32)
    return tables + inputs + positions + modulations


def _largest_matrix(config: FluxConfig) -> int:
    return max(
        target.rows * layer.columns
        for layer in flux_layers(config)
        if layer.columns is not None
        for target in layer.targets
    )


def weights_bytes(config: FluxConfig, tensors: Iterable[TensorSpec]) -> int:
    """Bytes of one GPU that the transformer takes: its region, and what a rank must copy.

    ``tensors`` are the file's; those without the config's prefix do not count.
    """
    own = [tensor for tensor in tensors if tensor.name.startswith(config.prefix)]
    layers = {layer.source for layer in flux_layers(config) if layer.swapped}
    copied = sum(
        tensor.nbytes
        for tensor in own
        if tensor.name.removeprefix(config.prefix).rpartition(".")[0] in layers
    )
    return region_bytes(lay_out(own)) + copied


def fp8_bytes(config: FluxConfig) -> int:
    """What the same transformer would take as an fp8 file: one byte per element, nearly."""
    return sum(
        target.rows * (layer.columns or 1)
        for layer in flux_layers(config)
        for target in layer.targets
    )


def text_encoder_bytes(config: FluxConfig) -> int:
    """T5-XXL and CLIP-L in 16 bits, or 0 for a model that takes other encoders' text."""
    if (config.context_width, config.pooled_width) != (_T5_WIDTH, _CLIP_WIDTH):
        return 0
    return (_T5_XXL + _CLIP_L) * _COMPANION_BYTES
