"""The sizes of one VAE, all of them read from the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

LATENT_CHANNELS = 16
IMAGE_CHANNELS = 3
# A FLUX.1 model works on (latent - shift) * scale. Both belong to the model: what a VAE here takes
# and gives has neither. They are for whoever builds diffusers' config.
LATENT_SCALE = 0.3611
LATENT_SHIFT = 0.1159
# Every normalisation of this family has so many groups, and no tensor tells.
NORM_GROUPS = 32


@dataclass(frozen=True)
class VaeConfig:
    """An autoencoder of FLUX's kind: 16 latent channels, no quantising convolutions.

    ``widths`` are the channels of each level, the one of full resolution first; each further
    level halves height and width. ``blocks`` residual blocks per level of the encoder, one more in
    the decoder. ``dtypes`` are safetensors names, the one with the most bytes first; ``prefix`` is
    what stands before each tensor's name in the file; ``nbytes`` bytes of weights.
    """

    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    dtypes: tuple[str, ...]
    prefix: str
    nbytes: int

    @property
    def ratio(self) -> int:
        """Pixels per latent pixel, in height and in width."""
        return int(2 ** (len(self.widths) - 1))
