"""The sizes of one text encoder, all of them read from the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

# CLIP's last token in a vocabulary of 49408.
_CLIP_END = 49407
_CLIP_HEAD = 64


@dataclass(frozen=True)
class ClipConfig:
    """CLIP's text model, as in CLIP-L. Sizes count elements, ``nbytes`` bytes of weights.

    ``positions`` is the one length of text that it takes. ``dtypes`` are safetensors names, the
    one with the most bytes first; ``scaled``: fp8 weights have scales beside them; ``prefix`` is
    what stands before each tensor's name in the file.
    """

    vocabulary: int
    positions: int
    width: int
    mlp_size: int
    layers: int
    dtypes: tuple[str, ...]
    scaled: bool
    prefix: str
    nbytes: int

    @property
    def heads(self) -> int:
        """Attention heads; no tensor tells.

        Every published CLIP has heads of 64 elements. Where 64 does not divide the width, as in
        tiny models for tests: as many heads of 64 as fit, less until the width can be divided.
        """
        most = max(1, self.width // _CLIP_HEAD)
        return next(heads for heads in range(most, 0, -1) if self.width % heads == 0)

    @property
    def end_token(self) -> int:
        """The token after the text, and after it the padding: 49407, or the last one there is."""
        return min(_CLIP_END, self.vocabulary - 1)


@dataclass(frozen=True)
class T5Config:
    """T5's encoder of version 1.1 (gated GELU), as in T5-XXL.

    ``head_size`` times ``heads`` need not be the width. ``buckets`` of relative positions. The
    rest as in :class:`ClipConfig`.
    """

    vocabulary: int
    width: int
    heads: int
    head_size: int
    mlp_size: int
    layers: int
    buckets: int
    dtypes: tuple[str, ...]
    scaled: bool
    prefix: str
    nbytes: int
