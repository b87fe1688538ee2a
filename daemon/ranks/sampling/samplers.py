"""One step of each sampler, from one noise level to the next.

Euler and Heun: algorithms 1 and 2 of Karras et al., https://arxiv.org/abs/2206.00364, without
noise; DPM-Solver++(2M): https://arxiv.org/abs/2211.01095. The latent's noise level is used as
their sigma, as ComfyUI does for FLUX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Position(NamedTuple):
    """Where a run is: the latent (B, C, H, W), and what the model took it for a step ago."""

    latent: Tensor
    denoised: Tensor | None


class Levels(NamedTuple):
    """Noise levels about one step, each fp32 without dimensions: of the step before (None: there
    was none), of now, and the next one, which is 0 if ``last``."""

    before: Tensor | None
    now: Tensor
    next: Tensor
    last: bool


# (latent, sigma) → the latent without noise, as the model sees it.
Denoise = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Denoise, Position, Levels], Position]


def _euler(denoise: Denoise, position: Position, levels: Levels) -> Position:
    latent = position.latent
    denoised = denoise(latent, levels.now)
    slope = (latent - denoised) / levels.now
    return Position(latent + slope * (levels.next - levels.now), denoised)


def _heun(denoise: Denoise, position: Position, levels: Levels) -> Position:
    latent = position.latent
    denoised = denoise(latent, levels.now)
    slope = (latent - denoised) / levels.now
    length = levels.next - levels.now
    ahead = latent + slope * length
    if levels.last:
        return Position(ahead, denoised)
    slope_ahead = (ahead - denoise(ahead, levels.next)) / levels.next
    return Position(latent + (slope + slope_ahead) / 2 * length, denoised)


def _dpmpp_2m(denoise: Denoise, position: Position, levels: Levels) -> Position:
    latent, before = position
    denoised = denoise(latent, levels.now)
    now, following = levels.now.log().neg(), levels.next.log().neg()
    length = following - now
    estimate = denoised
    if before is not None and levels.before is not None and not levels.last:
        ratio = (now - levels.before.log().neg()) / length
        estimate = (1 + 1 / (2 * ratio)) * denoised - 1 / (2 * ratio) * before
    shrink = following.neg().exp() / now.neg().exp()
    return Position(shrink * latent - (-length).expm1() * estimate, denoised)


SAMPLERS: dict[str, Step] = {
    "euler": _euler,
    # ComfyUI's ddim is Euler; with a mask it draws another noise: see Denoising.start.
    "ddim": _euler,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
}
