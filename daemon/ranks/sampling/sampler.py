"""The denoising of a batch of latents, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from .latent_format import to_model, to_vae
from .mask import fit_mask
from .samplers import SAMPLERS, Levels, Position, Step

# (latent (B, C, H, W) fp32, sigma (B,) fp32) → FLUX's velocity of the same shape as the latent, any
# floating dtype; where a run needs both, the velocities with and without the prompt.
Model = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Kept:
    """What lies outside of the mask: the original, with the noise of the level."""

    mask: Tensor
    rest: Tensor
    original: Tensor
    noise: Tensor

    def into_input(self, latent: Tensor, sigma: Tensor) -> Tensor:
        original = _add_noise(self.original, self.noise, sigma)
        return latent * self.mask + original * self.rest

    def into_answer(self, denoised: Tensor) -> Tensor:
        return denoised * self.mask + self.original * self.rest


class Denoising:
    """One run: ``latent`` (B, C, H, W) in fp32 goes from ``sigmas[0]`` to ``sigmas[-1]``.

    ``index`` counts the steps that are done, ``denoised`` is the model's latest idea of the
    result, for previews (both latents are the transformer's, not the VAE's). All arithmetic is
    fp32, in the order of ComfyUI's, so that on the same device the numbers are the same.
    """

    def __init__(
        self, latent: Tensor, sigmas: Tensor, step: Step, cfg: float, kept: _Kept | None
    ) -> None:
        """Use :meth:`start`."""
        self.latent = latent
        self.sigmas = sigmas
        self.denoised: Tensor | None = None
        self.index = 0
        self.cfg = cfg
        self._step = step
        self._kept = kept
        # Asked for once: on a GPU every look at a number waits for all that is under way.
        self._ends_at_zero = sigmas[-1].item() == 0

    @classmethod
    def start(
        cls,
        noise: Tensor,
        sigmas: Tensor,
        *,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        mask_noise: Tensor | None = None,
        cfg: float = 1.0,
        sampler: str = "euler",
    ) -> Self:
        """A run that has done no step yet, on the device of ``noise`` (B, C, H, W).

        ``sigmas`` [steps + 1] fall strictly, from at most 1 to 0 or above. ``latent``, of the shape
        of ``noise``, is the VAE's and what the run begins with; None or all zeros is the empty
        latent. ``mask`` is 1 where to denoise (see :func:`~.mask.fit_mask`); the rest keeps the
        latent. ``mask_noise`` is what the rest is noised with, by default ``noise``: ComfyUI's
        "ddim" takes that of the next seed. With ``cfg`` other than 1 the model is asked for two
        velocities.

        ComfyUI treats a first sigma that is the model's highest in its own way; for flow models
        like FLUX that changes no number.

        Raises ValueError for shapes, sigmas or a sampler that cannot work.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; use one of: {', '.join(SAMPLERS)}")
        if not math.isfinite(cfg):
            raise ValueError(f"cfg={cfg}: use a finite number")
        if noise.ndim != 4 or not noise.numel():
            raise ValueError(f"noise of shape {tuple(noise.shape)}: use (batch, channels, h, w)")
        _check_sigmas(sigmas)
        noise = noise.float()
        sigmas = sigmas.float().to(noise.device)
        original = _original(latent, noise)
        kept = None
        if mask is not None:
            fitted = fit_mask(mask, noise.shape).to(noise.device)
            outside = noise if mask_noise is None else _alike("mask_noise", mask_noise, noise)
            kept = _Kept(fitted, 1.0 - fitted, original, outside)
        noisy = _add_noise(original, noise, sigmas[0])
        return cls(noisy, sigmas, SAMPLERS[sampler], cfg, kept)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return len(self.sigmas) - 1

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= self.steps

    @property
    def needs_unconditional(self) -> bool:
        """Whether the model is to give a pair of velocities."""
        return not math.isclose(self.cfg, 1.0)

    @torch.no_grad()
    def step(self, model: Model) -> None:
        """One step further: one call of the model, two for "heun" except in its last step.

        If the model raises, nothing has changed and the step can be tried again. Raises
        RuntimeError when the run is done, ValueError for an answer of another shape.
        """
        if self.done:
            raise RuntimeError(f"all {self.steps} steps are done: take the result")

        def denoise(latent: Tensor, sigma: Tensor) -> Tensor:
            return self._denoise(model, latent, sigma)

        before = self.sigmas[self.index - 1] if self.index else None
        now, following = self.sigmas[self.index], self.sigmas[self.index + 1]
        # Falling sigmas: none but the last can be 0. Other runs end above it.
        last = self.index + 1 == self.steps and self._ends_at_zero
        position = self._step(
            denoise,
            Position(self.latent, self.denoised),
            Levels(before, now, following, last),
        )
        self.latent, self.denoised = position
        self.index += 1

    def result(self) -> Tensor:
        """The latent for the VAE, (B, C, H, W) in fp32. Raises RuntimeError while steps are left.

        A run that ends above 0 gives the latent without the noise's share, noise in it, as ComfyUI
        hands it to a following run.
        """
        if not self.done:
            raise RuntimeError(f"{self.index} of {self.steps} steps are done: do the others first")
        return to_vae(self.latent / (1.0 - self.sigmas[-1]))

    def _denoise(self, model: Model, latent: Tensor, sigma: Tensor) -> Tensor:
        if self._kept is not None:
            latent = self._kept.into_input(latent, sigma)
        answer = model(latent, sigma.expand(latent.shape[0]))
        velocity, other = answer if isinstance(answer, tuple) else (answer, None)
        denoised = _subtract(latent, velocity, sigma)
        if self.needs_unconditional:
            if other is None:
                raise ValueError(f"cfg={self.cfg} needs the velocity without the prompt, too")
            without = _subtract(latent, other, sigma)
            denoised = without + (denoised - without) * self.cfg
        return denoised if self._kept is None else self._kept.into_answer(denoised)


def _subtract(latent: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The latent without the noise that the model sees in it."""
    if velocity.shape != latent.shape:
        raise ValueError(
            f"the model's velocity has shape {tuple(velocity.shape)}, the latent has "
            f"{tuple(latent.shape)}"
        )
    return latent - velocity.float() * sigma


def _add_noise(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return sigma * noise + (1.0 - sigma) * latent


def _original(latent: Tensor | None, noise: Tensor) -> Tensor:
    if latent is None:
        return torch.zeros_like(noise)
    latent = _alike("latent", latent, noise)
    # Zeros mean that there is no picture; shifted, they would be a grey one.
    return to_model(latent) if latent.any() else latent


def _alike(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    if tensor.shape != noise.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, noise has {tuple(noise.shape)}: they must be "
            "equal"
        )
    return tensor.float().to(noise.device)


def _check_sigmas(sigmas: Tensor) -> None:
    values = sigmas.tolist() if sigmas.ndim == 1 else []
    falling = all(one > other for one, other in pairwise(values))
    if len(values) < 2 or not falling or not 0 <= values[-1] <= values[0] <= 1:
        shown = ", ".join(f"{value:g}" for value in values[:4])
        raise ValueError(
            f"sigmas of shape {tuple(sigmas.shape)} ({shown} …) cannot be gone through: use two or "
            "more that fall from at most 1 to 0 or above"
        )
