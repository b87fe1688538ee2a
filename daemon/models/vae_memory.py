"""How much memory a VAE needs beside its weights, and when it must work in tiles."""

from __future__ import annotations

from ...protocol.manifest import DTYPE_BYTES
from .vae_config import VaeConfig

# ComfyUI's estimate for this family (memory_used_decode in its comfy/sd.py, 0.3.75): elements per
# pixel of the picture, for a VAE whose full resolution has 128 channels.
_ELEMENTS = 2178
_CHANNELS = 128
# In latent pixels. ComfyUI's, where a decode ran out of memory.
TILE = 64
TILE_OVERLAP = 16


def decode_bytes(config: VaeConfig, height: int, width: int, dtype: str) -> int:
    """Bytes that decoding one latent of ``height`` by ``width`` takes while it runs.

    ``dtype`` is the safetensors name of the dtype that is computed in. In proportion to the
    channels at full resolution, where the memory goes; of FLUX.1's size, ComfyUI's own number.
    """
    pixels = height * width * config.ratio**2
    return pixels * _ELEMENTS * DTYPE_BYTES[dtype] * config.widths[0] // _CHANNELS


def needs_tiles(
    config: VaeConfig, height: int, width: int, dtype: str, free_bytes: int, ways: int = 1
) -> bool:
    """Whether a decode in one piece would not fit into ``free_bytes``, but tiles are smaller.

    ``ways``: among how many ranks it is shared, each with so many free.
    """
    whole = decode_bytes(config, height, width, dtype)
    return whole // ways > free_bytes and whole > decode_bytes(config, TILE, TILE, dtype)
