"""A whole picture: prompt, denoising and decoding, one step a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ....protocol import messages as m
from ....protocol.manifest import DTYPE_BYTES
from ...models.flux_config import FluxConfig
from ..denoiser import Conditioning, DenoiserOptions
from ..dtypes import DTYPES
from ..outputs import check_output
from ..sampling.latent_format import to_vae
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Denoising
from ..sampling.schedule import DEV_MU, SCHNELL_SHIFT, flux_sigmas
from .base import Engines, Place, Progress, Run, Tensors, require

_PIXELS = 8  # of a picture per latent pixel, where no VAE says otherwise
_NEGATIVE = "negative_"
_DDIM = "ddim"


class PictureRun(Run):
    """See :class:`~.base.Run`."""

    def __init__(self, job: m.Generate, tensors: Tensors, place: Place, engines: Engines) -> None:
        self._job = job
        self._tensors = tensors
        self._place = place
        self._engines = engines
        self._options = DenoiserOptions(
            session=place.session,
            region=place.region("transformer"),
            compute=job.compute,
            fp8_matmul=job.fp8_matmul,
            degrees=job.degrees,
            adapters=place.loras(job.adapters),
        )
        # What is kept of each stays apart.
        self._negative_options = replace(self._options, run=_NEGATIVE)
        self._config = _check_model(engines.denoiser.config(self._options))
        shape = self._latent_shape()
        # Sooner told than at the end.
        check_output("latent", prod(shape) * DTYPE_BYTES["F32"])
        if job.decode:
            engines.autoencoder.check_size(place.region("vae"), job.compute, shape)
        elif job.preview and "vae" in job.components:
            engines.components.find(place.region("vae"), "vae")
        self._denoising = self._start(shape)
        self._positive: Conditioning | None = None
        self._negative: Conditioning | None = None

    def advance(self) -> Progress | Tensors:
        """Prompt, step, step, …, and at the end "latent" and, if asked for, "image"."""
        denoising = self._denoising
        if self._positive is None:
            positive = self._condition("")
            if denoising.needs_unconditional:
                self._negative = self._condition(_NEGATIVE)
            self._positive = positive
            return Progress(0, denoising.steps)
        if not denoising.done:
            denoising.step(self._velocity)
            return Progress(denoising.index, denoising.steps, self._preview())
        latent = denoising.result()
        if not self._job.decode:
            return {"latent": latent}
        image = self._engines.autoencoder.decode(
            self._place.region("vae"), self._job.compute, latent
        )
        return {"latent": latent, "image": image}

    def end(self) -> None:
        """See :meth:`~.base.Run.end`."""
        for options in (self._options, self._negative_options):
            self._engines.denoiser.forget_run(options)

    def _start(self, shape: Sequence[int]) -> Denoising:
        job, tensors = self._job, self._tensors
        device = self._engines.group.device
        latent = tensors.get("latent")
        noise = tensors.get("noise")
        if noise is None:
            noise = seeded_noise(shape, job.seed)
        sigmas = tensors.get("sigmas")
        if sigmas is None:
            guided = self._config.guidance
            sigmas = flux_sigmas(
                job.steps,
                mu=DEV_MU if guided else None,
                shift=None if guided else SCHNELL_SHIFT,
                scheduler=job.scheduler,
                denoise=job.denoise,
            )
        mask, mask_noise = tensors.get("mask"), None
        if mask is not None and job.sampler == _DDIM:
            # As in ComfyUI, which draws another noise for what lies outside of the mask.
            mask_noise = seeded_noise(tuple(noise.shape), job.seed + 1)
        return Denoising.start(
            noise.to(device),
            sigmas,
            latent=latent,
            mask=mask,
            mask_noise=mask_noise,
            cfg=job.cfg,
            sampler=job.sampler,
        )

    def _latent_shape(self) -> tuple[int, ...]:
        """(B, C, h, w) of what is denoised."""
        for name in ("noise", "latent"):
            if (given := self._tensors.get(name)) is not None:
                if given.ndim != 4:
                    raise ValueError(
                        f"{name} of shape {tuple(given.shape)}: give (batch, channels, h, w)"
                    )
                return tuple(given.shape)
        job, ratio = self._job, _PIXELS
        if (region := self._place.region("vae")) is not None:
            ratio = self._engines.autoencoder.ratio(region, job.compute)
        channels = self._config.out_channels // 4
        return job.batch, channels, job.height // ratio, job.width // ratio

    def _condition(self, prefix: str) -> Conditioning:
        """What a prompt, or ready conditioning, makes of each latent of the batch."""
        tensors = self._tensors
        if f"{prefix}context" in tensors:
            context, pooled = tensors[f"{prefix}context"], tensors.get(f"{prefix}y")
        else:
            clip_ids, t5_ids = require(tensors, f"{prefix}clip_l_ids", f"{prefix}t5_ids")
            clip, t5 = self._place.region("clip_l"), self._place.region("t5")
            context, pooled = self._engines.texts.encode(clip, t5, clip_ids, t5_ids)
        rows = self._denoising.latent.shape[0]
        device = self._engines.group.device
        return Conditioning(
            context=_spread("context", context, rows).to(device),
            y=None if pooled is None else _spread("y", pooled, rows).to(device),
            guidance=self._guidance(rows),
            name=f"job {self._place.job}",
        )

    def _guidance(self, rows: int) -> Tensor | None:
        if not self._config.guidance:
            return None
        # In the compute dtype, as ComfyUI hands it over: see `to_inputs`.
        dtype, device = DTYPES[self._job.compute], self._engines.group.device
        return torch.full((rows,), self._job.guidance, dtype=dtype, device=device)

    def _velocity(self, x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        denoiser = self._engines.denoiser
        positive, negative = self._positive, self._negative
        if positive is None:
            raise RuntimeError("the prompt was not encoded")
        if negative is None:
            return denoiser.predict(self._options, x, sigma, positive)
        both = _join(positive, negative)
        if both is None:  # prompts of different lengths
            return (
                denoiser.predict(self._options, x, sigma, positive),
                denoiser.predict(self._negative_options, x, sigma, negative),
            )
        output = denoiser.predict(self._options, x.repeat(2, 1, 1, 1), sigma.repeat(2), both)
        with_prompt, without = output.chunk(2)
        return with_prompt, without

    def _preview(self) -> Tensors:
        denoised = self._denoising.denoised
        if not self._job.preview or denoised is None:
            return {}
        if "vae" not in self._job.components:
            return {"preview": denoised[0]}
        preview = self._engines.autoencoder.preview(
            self._place.region("vae"), self._job.compute, to_vae(denoised)
        )
        return {"preview": preview}


def _check_model(config: FluxConfig) -> FluxConfig:
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"this {config.variant} needs a picture besides the prompt, which only ComfyUI's nodes "
            "give it: use the XDiT UNet Loader there, or a FLUX.1 dev or schnell file here"
        )
    return config


def _spread(name: str, tensor: Tensor, rows: int) -> Tensor:
    """One row stands for all."""
    if tensor.ndim == 0 or tensor.shape[0] not in (1, rows):
        shape = tuple(tensor.shape)
        raise ValueError(f"{name} has shape {shape} for {rows} latents: give 1 or {rows} rows")
    return tensor.expand(rows, *tensor.shape[1:])


def _join(positive: Conditioning, negative: Conditioning) -> Conditioning | None:
    """Both as one batch, or None where their shapes differ."""
    if positive.context.shape != negative.context.shape:
        return None
    if positive.y is None or negative.y is None:
        return None

    def join(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other])

    return Conditioning(
        context=torch.cat([positive.context, negative.context]),
        y=join(positive.y, negative.y),
        guidance=join(positive.guidance, negative.guidance),
        name=positive.name,
    )
