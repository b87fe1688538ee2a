"""Decoding a latent in overlapping tiles that fade into each other, for want of memory.

Tiles and weights are those of ComfyUI's tiled decode: three passes with square, tall and wide
tiles, averaged, so that no seam of one pass is where another has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from ...models.vae_config import IMAGE_CHANNELS

# A latent [1, channels, h, w] to its picture [1, 3, h * ratio, w * ratio] in fp32.
Decode = Callable[[torch.Tensor], torch.Tensor]


def decode_in_tiles(
    latent: torch.Tensor, decode: Decode, ratio: int, *, tile: int, overlap: int
) -> torch.Tensor:
    """A latent [1, channels, h, w] to its picture, by decoding at most ``tile`` squared at once.

    ``tile`` and ``overlap`` are latent pixels: twice ``overlap`` must be less than ``tile``, or
    ValueError is raised. What fits into one tile is decoded whole.
    """
    if not 0 <= 2 * overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}: use less than half")
    if max(latent.shape[2:]) <= tile // 2:
        return decode(latent)  # one tile of each shape, three times the same
    shapes = ((tile, tile), (2 * tile, tile // 2), (tile // 2, 2 * tile))
    passes = (_one_pass(latent, decode, ratio, shape, overlap) for shape in shapes)
    total = next(passes)
    for image in passes:
        total = total + image
    return total / len(shapes)


def _one_pass(
    latent: torch.Tensor, decode: Decode, ratio: int, tile: tuple[int, int], overlap: int
) -> torch.Tensor:
    height, width = latent.shape[2:]
    if height <= tile[0] and width <= tile[1]:
        return decode(latent)
    image = latent.new_zeros(
        (1, IMAGE_CHANNELS, height * ratio, width * ratio), dtype=torch.float32
    )
    weights = torch.zeros_like(image[:, :1])
    rows, columns = (
        _positions(size, side, overlap) for size, side in zip((height, width), tile, strict=True)
    )
    for (top, tall), (left, wide) in itertools.product(rows, list(columns)):
        part = decode(latent[:, :, top : top + tall, left : left + wide])
        down = _ramp(tall * ratio, overlap * ratio, latent.device)
        across = _ramp(wide * ratio, overlap * ratio, latent.device)
        mask = down[:, None] * across[None, :]
        place = (
            ...,
            slice(top * ratio, (top + tall) * ratio),
            slice(left * ratio, (left + wide) * ratio),
        )
        image[place] += part * mask
        weights[place] += mask
    return image.div_(weights)


def _positions(size: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Where tiles begin, and how long they are; the last one may be shorter."""
    if size <= tile:
        yield 0, size
        return
    for start in range(0, size - overlap, tile - overlap):
        yield start, min(tile, size - start)


def _ramp(length: int, feather: int, device: torch.device) -> torch.Tensor:
    """Weights of one axis: rising over ``feather`` pixels, falling at the end; [length] fp32."""
    ramp = torch.ones(length, device=device)
    # A tile that is all overlap counts fully.
    if 0 < feather < length:
        rise = torch.arange(1, feather + 1, device=device) / feather
        ramp[:feather] *= rise
        ramp[-feather:] *= rise.flip(0)
    return ramp
