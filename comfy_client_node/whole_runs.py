"""Which runs of a sampler the daemon can do as a whole; all others are ComfyUI's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import chain, pairwise
from typing import Any, NamedTuple

import comfy.model_sampling
import comfy.samplers
import torch

from .fallback import added_by_others
from .problems import find_problem
from .remote_model import RemoteTransformer

SAMPLERS = ("euler", "ddim", "heun", "dpmpp_2m")
# What a condition may have besides text, for the daemon to compute with it.
_PLAIN = {"pooled_output", "guidance", "uuid"}
GUIDANCE = 3.5  # where a condition says nothing
_SAMPLING = "model_sampling"
_ARITHMETIC = ("calculate_input", "calculate_denoised", "noise_scaling", "inverse_noise_scaling")
RATIO = "downscale_ratio_spacial"  # newer versions note it in empty latents
_FLUX_RATIO = 8
Conditioning = Sequence[tuple[Any, Mapping[str, Any]]]


class Run(NamedTuple):
    """What a KSampler is asked for; ``latent`` is ComfyUI's dict of a LATENT wire."""

    model: Any
    positive: Conditioning
    negative: Conditioning
    latent: Mapping[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float


def why_not(run: Run) -> str | None:
    """Why the daemon cannot do the whole run; None if it can.

    Whatever is not known here is ComfyUI's to do: its own loop asks the daemon for forwards.
    """
    if not isinstance(run.model.model.diffusion_model, RemoteTransformer):
        return "the model was loaded into ComfyUI"
    return next(chain(_of_request(run), _of_conditioning(run), _of_model(run.model)), None)


def _of_request(run: Run) -> Iterator[str]:
    if run.sampler not in SAMPLERS:
        yield f"the sampler {run.sampler} is ComfyUI's own"
    samples = run.latent["samples"]
    ratio = run.latent.get(RATIO)
    others = run.latent.keys() - {"samples", "noise_mask", RATIO}
    if samples.is_nested or samples.ndim != 4 or others or ratio not in (None, _FLUX_RATIO):
        yield "the latents are of a special kind"
    if run.denoise <= 0:
        yield "nothing is to be denoised"
    elif not _can_be_gone_through(sigmas_of(run)):
        yield "the noise levels do not fall from step to step"


def _of_conditioning(run: Run) -> Iterator[str]:
    groups = [run.positive, *([run.negative] if is_guided(run) else [])]
    if any(len(group) != 1 for group in groups):
        yield "several prompts are combined, or there is none"
        return
    rows = len(run.latent["samples"])
    for context, options in (group[0] for group in groups):
        pooled = options.get("pooled_output")
        if context is None or pooled is None:
            yield "the conditioning is no text's"
        elif any(len(tensor) not in (1, rows) for tensor in (context, pooled)):
            yield "the conditioning is for another number of latents"
        if extra := sorted(key for key in options if key not in _PLAIN and _is_set(options[key])):
            yield f"the conditioning has {', '.join(extra)}"
    guidances = {group[0][1].get("guidance", GUIDANCE) for group in groups}
    if len(guidances) > 1 or None in guidances:
        yield "the prompts differ in guidance, or have none"


def _of_model(model: Any) -> Iterator[str]:
    options = {**model.model_options, **model.model_options["transformer_options"]}
    del options["transformer_options"]
    if changed := sorted(key for key, value in options.items() if _is_set(value)):
        yield f"the model was changed by {', '.join(changed)}"
    if added := added_by_others(model):
        yield f"nodes have added {', '.join(added)} to the model"
    if replaced := sorted(model.object_patches.keys() - {_SAMPLING}):
        yield f"nodes have replaced {', '.join(replaced)} of the model"
    if not _is_flow(model.get_model_object(_SAMPLING)):
        yield "the model is sampled in another way than FLUX.1 is"
    config = model.model.model_config.unet_config
    if config["in_channels"] != config["out_channels"]:
        yield "the model needs a picture besides the prompt"
    if problem := find_problem(model, {}):
        yield problem


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, Sized) and not value)


def is_guided(run: Run) -> bool:
    """Whether the negative prompt counts."""
    return not math.isclose(run.cfg, 1.0)  # as ComfyUI compares


def _is_flow(sampling: Any) -> bool:
    """Whether the daemon calculates as this model sampling does: FLUX's, timesteps are sigmas."""
    plain = comfy.model_sampling.CONST
    probe = torch.tensor([0.25, 1.0])
    return all(
        getattr(type(sampling), name, None) is getattr(plain, name) for name in _ARITHMETIC
    ) and torch.equal(sampling.timestep(probe), probe)


def _can_be_gone_through(sigmas: torch.Tensor) -> bool:
    levels = sigmas.tolist()
    falling = all(one > other for one, other in pairwise(levels))
    return len(levels) > 1 and falling and levels[-1] >= 0 and levels[0] <= 1


def sigmas_of(run: Run) -> torch.Tensor:
    """ComfyUI's own, so that each of its schedulers and samplings works."""
    sampler = comfy.samplers.KSampler(
        run.model,
        steps=run.steps,
        device=torch.device("cpu"),
        sampler=run.sampler,
        scheduler=run.scheduler,
        denoise=run.denoise,
        model_options=run.model.model_options,
    )
    sigmas: torch.Tensor = sampler.sigmas.float().cpu()
    return sigmas
