"""The sizes of one FLUX.1 model, all of them read from the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

# A Fill model sees the mask at full resolution: one latent pixel is 8 by 8 pixels, one token 2 by 2
# latent pixels.
_MASK_CHANNELS = 8 * 8 * 2 * 2


@dataclass(frozen=True)
class FluxConfig:
    """Sizes count elements, ``nbytes`` bytes of weights; channels are those of a packed token.

    A token is 2 by 2 latent pixels: ``out_channels`` is 4 times the latent's channels,
    ``in_channels`` may hold more (Fill: the masked picture and the mask). ``dtypes`` are
    safetensors names, the one with the most bytes first. ``scaled``: fp8 weights have scales beside
    them. ``prefix`` is what stands before each tensor's name in the file.
    """

    in_channels: int
    out_channels: int
    hidden_size: int
    head_size: int
    mlp_size: int
    double_blocks: int
    single_blocks: int
    context_width: int
    pooled_width: int
    guidance: bool
    dtypes: tuple[str, ...]
    scaled: bool
    prefix: str
    nbytes: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden_size // self.head_size

    @property
    def mlp_ratio(self) -> float:
        """How many times wider the MLPs are than the model."""
        return self.mlp_size / self.hidden_size

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """How much of a head encodes the reference index, the row and the column.

        FLUX.1's heads of 128 have (16, 56, 56), and no tensor tells. Other head sizes get the same
        proportions, each axis even: row and column 7/16 each, rounded down, the index the rest.
        """
        side = self.head_size * 7 // 32 * 2
        return self.head_size - 2 * side, side, side

    @property
    def variant(self) -> str:
        """For people. Kontext, Krea and other retrained models have dev's shapes."""
        if self.in_channels == self.out_channels:
            return "FLUX.1 dev or Kontext" if self.guidance else "FLUX.1 schnell"
        if self.in_channels == 2 * self.out_channels:
            return "FLUX.1 Canny or Depth"
        if self.in_channels == 2 * self.out_channels + _MASK_CHANNELS:
            return "FLUX.1 Fill"
        return f"FLUX.1 with {self.in_channels} input channels"
