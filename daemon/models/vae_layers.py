"""Every layer of a VAE file, and which module of diffusers' AutoencoderKL it becomes.

Source names are those of CompVis' latent diffusion (github.com/CompVis/latent-diffusion), which
Black Forest Labs' ae.safetensors and ComfyUI have; target names are diffusers' module names. The
two differ in words, in the order of the decoder's levels (the file counts from full resolution,
diffusers from the latent), and in the attention, whose convolutions of 1 by 1 are linear layers
in diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .vae_config import IMAGE_CHANNELS, VaeConfig


class VaeLayer(NamedTuple):
    """A convolution (weight [rows, columns, side, side]) or, without columns, a norm [rows].

    Both have a bias [rows]. ``linear``: the target's weight is [rows, columns].
    """

    source: str
    target: str
    rows: int
    columns: int | None = None
    side: int = 3
    linear: bool = False

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Tensor name in the file (without prefix) → its shape."""
        weight = [self.rows]
        if self.columns is not None:
            weight += [self.columns, self.side, self.side]
        return {f"{self.source}.weight": weight, f"{self.source}.bias": [self.rows]}


def vae_layers(config: VaeConfig) -> Iterator[VaeLayer]:
    """All layers that a file of this config has, each once."""
    yield from _encoder(config)
    yield from _decoder(config)


def _encoder(config: VaeConfig) -> Iterator[VaeLayer]:
    width = config.widths[0]
    yield VaeLayer("encoder.conv_in", "encoder.conv_in", width, IMAGE_CHANNELS)
    for level, rows in enumerate(config.widths):
        source, target = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for block in range(config.blocks):
            yield from _block(f"{source}.block.{block}", f"{target}.resnets.{block}", rows, width)
            width = rows
        if level < len(config.widths) - 1:
            yield VaeLayer(
                f"{source}.downsample.conv", f"{target}.downsamplers.0.conv", width, width
            )
    yield from _middle("encoder", width)
    # Means and logarithms of variances.
    yield from _end("encoder", 2 * config.latent_channels, width)


def _decoder(config: VaeConfig) -> Iterator[VaeLayer]:
    width = config.widths[-1]
    yield VaeLayer("decoder.conv_in", "decoder.conv_in", width, config.latent_channels)
    yield from _middle("decoder", width)
    for number, rows in enumerate(reversed(config.widths)):
        level = len(config.widths) - 1 - number
        source, target = f"decoder.up.{level}", f"decoder.up_blocks.{number}"
        for block in range(config.blocks + 1):
            yield from _block(f"{source}.block.{block}", f"{target}.resnets.{block}", rows, width)
            width = rows
        if level:
            yield VaeLayer(f"{source}.upsample.conv", f"{target}.upsamplers.0.conv", width, width)
    yield from _end("decoder", IMAGE_CHANNELS, width)


def _block(source: str, target: str, rows: int, columns: int) -> Iterator[VaeLayer]:
    yield VaeLayer(f"{source}.norm1", f"{target}.norm1", columns)
    yield VaeLayer(f"{source}.conv1", f"{target}.conv1", rows, columns)
    yield VaeLayer(f"{source}.norm2", f"{target}.norm2", rows)
    yield VaeLayer(f"{source}.conv2", f"{target}.conv2", rows, rows)
    if rows != columns:
        yield VaeLayer(f"{source}.nin_shortcut", f"{target}.conv_shortcut", rows, columns, side=1)


def _middle(half: str, width: int) -> Iterator[VaeLayer]:
    source, target = f"{half}.mid", f"{half}.mid_block"
    yield from _block(f"{source}.block_1", f"{target}.resnets.0", width, width)
    attention = f"{target}.attentions.0"
    yield VaeLayer(f"{source}.attn_1.norm", f"{attention}.group_norm", width)
    parts = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for part, name in parts.items():
        yield VaeLayer(
            f"{source}.attn_1.{part}", f"{attention}.{name}", width, width, side=1, linear=True
        )
    yield from _block(f"{source}.block_2", f"{target}.resnets.1", width, width)


def _end(half: str, rows: int, columns: int) -> Iterator[VaeLayer]:
    yield VaeLayer(f"{half}.norm_out", f"{half}.conv_norm_out", columns)
    yield VaeLayer(f"{half}.conv_out", f"{half}.conv_out", rows, columns)
