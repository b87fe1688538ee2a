"""From the arguments of ComfyUI's ``diffusion_model`` to FLUX's tokens, and back to a latent.

A token is 2 by 2 latent pixels. Positions are (index, row, column), counted in tokens; those of
text are all zero. Reference latents (Kontext) follow the latent as further tokens and are cut off
the answer. How they are placed is ComfyUI 0.3.75's choice, found by comparing outputs with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ...models.flux_config import FluxConfig
from ..parallel.transformer import FluxInputs

PATCH = 2  # latent pixels on each side of a token

RefLatentsMethod = Literal["offset", "index", "uxo"]


@dataclass(frozen=True)
class Placement:
    """Where the answer's latent lies among the tokens.

    ``height`` and ``width`` count latent pixels without padding, ``tokens`` all image tokens of the
    forward, those of references included.
    """

    height: int
    width: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of tokens."""
        return _tokens_across(self.height)

    @property
    def columns(self) -> int:
        """Tokens in a row."""
        return _tokens_across(self.width)


def to_inputs(
    config: FluxConfig,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    y: Tensor | None,
    guidance: Tensor | None,
    ref_latents: Sequence[Tensor] = (),
    ref_latents_method: RefLatentsMethod = "offset",
    *,
    compute_dtype: torch.dtype,
) -> tuple[FluxInputs, Placement]:
    """One forward's inputs, from the latent ``x`` (B, C, H, W) and what conditions it.

    C is a quarter of ``config.in_channels``. ``timestep`` and ``guidance`` are (B,) or (1,), the
    sigma and the unscaled strength, and stay fp32; ``context`` is (B, T, E), ``y`` (B, P) or wider
    (the rest is ignored) or None (zeros). ``ref_latents`` are (B, C, any height, any width). Odd
    heights and widths are padded with the opposite edge. All floating dtypes; on the device of
    ``x``; positions come out in host memory.

    Guidance for a model without it is ignored. None for a model with it comes out as None: the
    model must have been prepared by :func:`~.missing_guidance.allow_missing_guidance`.

    Raises ValueError for shapes that cannot work together or with the model.
    """
    if ref_latents_method not in get_args(RefLatentsMethod):
        methods = ", ".join(get_args(RefLatentsMethod))
        raise ValueError(
            f"reference latents cannot be placed by {ref_latents_method!r}; use one of: {methods}"
        )
    _check_latent("x", x, config, x.shape[0])
    rows = x.shape[0]
    for number, reference in enumerate(ref_latents):
        _check_latent(f"ref_latents[{number}]", reference, config, rows)
    _check_row("timestep", timestep, rows)
    _check_context(context, config, rows)
    if not config.guidance:
        guidance = None
    if guidance is not None:
        _check_row("guidance", guidance, rows)

    images = [x, *ref_latents]
    places = [_Place(0, 0, 0), *_place_references(x, ref_latents, ref_latents_method)]
    ids = [_ids(image, place) for image, place in zip(images, places, strict=True)]
    inputs = FluxInputs(
        hidden_states=_join([_pack(image.to(compute_dtype)) for image in images], dim=1),
        encoder_hidden_states=context.to(compute_dtype),
        pooled_projections=_pooled(y, config, x).to(compute_dtype),
        timestep=timestep.float(),
        img_ids=_join(ids, dim=0),
        txt_ids=torch.zeros(context.shape[1], 3),
        guidance=None if guidance is None else _exact_guidance(guidance),
    )
    return inputs, Placement(x.shape[2], x.shape[3], inputs.hidden_states.shape[1])


def from_tokens(tokens: Tensor, placement: Placement) -> Tensor:
    """The latent (B, C_out, H, W) from the model's prediction (B, tokens, 4·C_out).

    References and padding are cut off. Raises ValueError for tokens of another forward.
    """
    if tokens.ndim != 3 or tokens.shape[1] != placement.tokens or tokens.shape[2] % PATCH**2:
        raise ValueError(
            f"a prediction of shape {tuple(tokens.shape)} is not of this forward, which has "
            f"{placement.tokens} image tokens of {PATCH**2} times the latent's channels"
        )
    rows, columns = placement.rows, placement.columns
    own = tokens[:, : rows * columns]
    cells = own.reshape(tokens.shape[0], rows, columns, -1, PATCH, PATCH)
    latent = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return latent[:, :, : placement.height, : placement.width].contiguous()


@dataclass(frozen=True)
class _Place:
    """Where an image lies: its index, and the latent pixel of its upper left corner."""

    index: int
    top: int
    left: int


def _place_references(
    x: Tensor, references: Sequence[Tensor], method: RefLatentsMethod
) -> list[_Place]:
    """``index``: each reference in a plane of its own. ``uxo``: in the latent's plane, down and
    right of all before it. ``offset``: all in one plane, each beside or below those before it,
    whichever keeps their common rectangle shorter."""
    if method == "index":
        return [_Place(number, 0, 0) for number in range(1, len(references) + 1)]
    places = []
    if method == "uxo":
        top, left = (_tokens_across(side) * PATCH for side in x.shape[2:])
        for reference in references:
            places.append(_Place(0, top, left))
            top, left = top + reference.shape[2], left + reference.shape[3]
        return places
    height = width = 0
    for reference in references:
        tall, wide = reference.shape[2:]
        beside = tall + height > wide + width
        place = _Place(1, 0, width) if beside else _Place(1, height, 0)
        places.append(place)
        height, width = max(height, tall + place.top), max(width, wide + place.left)
    return places


def _tokens_across(pixels: int) -> int:
    return (pixels + PATCH // 2) // PATCH


def _ids(image: Tensor, place: _Place) -> Tensor:
    """(index, row, column) of each token, (tokens, 3) in fp32, in host memory."""
    top, left = _tokens_across(place.top), _tokens_across(place.left)
    ids = torch.empty(_tokens_across(image.shape[2]), _tokens_across(image.shape[3]), 3)
    ids[..., 0] = place.index
    ids[..., 1] = torch.arange(top, top + ids.shape[0])[:, None]
    ids[..., 2] = torch.arange(left, left + ids.shape[1])
    return ids.flatten(0, 1)


def _pack(image: Tensor) -> Tensor:
    """(B, C, H, W) to tokens (B, L, 4·C), each by channel, row, column."""
    below, right = image.shape[2] % PATCH, image.shape[3] % PATCH
    if below or right:
        image = functional.pad(image, (0, right, 0, below), mode="circular")
    rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
    cells = image.reshape(*image.shape[:2], rows, PATCH, columns, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``, which would copy a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _exact_guidance(guidance: Tensor) -> Tensor:
    # The sinusoids are of 1000 times the guidance. ComfyUI multiplies in the dtype that it hands
    # over: in bf16, 3.5 is embedded as 3504. Models were judged with that, so it is kept.
    if guidance.dtype == torch.float32:
        return guidance
    return (guidance * 1000.0).float() / 1000.0


def _pooled(y: Tensor | None, config: FluxConfig, x: Tensor) -> Tensor:
    width = config.pooled_width
    if y is None:
        return torch.zeros(x.shape[0], width, device=x.device)
    if y.ndim != 2 or y.shape[0] != x.shape[0] or y.shape[1] < width:
        raise ValueError(
            f"y has shape {tuple(y.shape)}; this model needs ({x.shape[0]}, {width}): pooled text "
            "of CLIP-L, one row for each latent"
        )
    return y[:, :width]


def _check_latent(name: str, latent: Tensor, config: FluxConfig, rows: int) -> None:
    channels = config.in_channels // PATCH**2
    shape = tuple(latent.shape)
    if latent.ndim != 4 or not all(shape):
        raise ValueError(f"{name} has shape {shape}; it must be (batch, {channels}, height, width)")
    if shape[1] != channels:
        raise ValueError(
            f"{name} has {shape[1]} channels, but this {config.variant} takes {channels}; "
            "encode with FLUX's own VAE, and give Fill, Canny and Depth models their picture"
        )
    if shape[0] != rows:
        raise ValueError(f"{name} has {shape[0]} rows, but x has {rows}; repeat it for each row")


def _check_context(context: Tensor, config: FluxConfig, rows: int) -> None:
    shape = tuple(context.shape)
    if context.ndim != 3 or shape[0] != rows or shape[2] != config.context_width:
        raise ValueError(
            f"context has shape {shape}; this model needs ({rows}, tokens, "
            f"{config.context_width}): text of T5-XXL, one row for each latent"
        )


def _check_row(name: str, row: Tensor, rows: int) -> None:
    if row.ndim != 1 or row.shape[0] not in (1, rows):
        raise ValueError(f"{name} has shape {tuple(row.shape)}; it must be ({rows},) or (1,)")
