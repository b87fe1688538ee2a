"""Whole runs of a sampler in the daemon: when it can do one, and doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..protocol import messages as m
from .link import Link
from .ranks_jobs import COMPUTE, run_on_ranks
from .refusals import find_problem
from .remote_model import RemoteTransformer
from .shared_weights import SharedWeights
from .sharing import renew_shared

SAMPLERS = ("euler", "ddim", "heun", "dpmpp_2m")
_PREVIEW_PIXELS = 512
# What a condition may have besides text, for the daemon to compute with it.
_PLAIN = {"pooled_output", "guidance", "cross_attn", "uuid", "model_conds"}
Conditioning = Sequence[tuple[torch.Tensor, Mapping[str, Any]]]


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
    """Why the daemon cannot do the whole run; None if it can."""
    transformer = run.model.model.diffusion_model
    if not isinstance(transformer, RemoteTransformer):
        return "the model was loaded into ComfyUI"
    if run.sampler not in SAMPLERS:
        return f"the sampler {run.sampler} is ComfyUI's own"
    conditions = [*run.positive, *(run.negative if run.cfg != 1 else ())]
    if len(run.positive) != 1 or len(conditions) > 2:
        return "several prompts are combined"
    for _, options in conditions:
        if extra := sorted(key for key in options if key not in _PLAIN):
            return f"the conditioning has {', '.join(extra)}"
    guidances = {options.get("guidance", 3.5) for _, options in conditions}
    if len(guidances) > 1 or None in guidances:
        return "the prompts differ in guidance"
    if run.latent["samples"].ndim != 4 or "batch_index" in run.latent:
        return "the latents are of a special kind"
    if run.denoise <= 0:
        return "nothing is to be denoised"
    options = run.model.model_options
    changed = sorted(key for key in options if key != "transformer_options" and options[key])
    changed += sorted(key for key, value in options["transformer_options"].items() if value)
    if changed:
        return f"the model was changed by {', '.join(changed)}"
    return find_problem(run.model, {})


def sample(run: Run, vae: Any | None = None) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The run, in the daemon: the LATENT and, with a shared ``vae``, its picture (B, H, W, 3).

    Progress and previews go to the node. Raises RuntimeError with what to do about it.
    """
    transformer: RemoteTransformer = run.model.model.diffusion_model
    tensors = _make_tensors(run)
    weights = None if vae is None else shared_vae(vae)
    components = {} if weights is None else {"vae": weights}
    compute, guidance = _compute_of(run.model), run.positive[0][1].get("guidance", 3.5)
    bar = comfy.utils.ProgressBar(run.steps)

    def on_step(step: int, steps: int, preview: torch.Tensor | None) -> None:
        bar.update_absolute(step, steps, _picture_of(preview))

    def make_job() -> m.Generate:
        return m.Generate(
            components={**transformer.components(), **components},
            tensors=[],
            compute=compute,
            degrees=transformer.degrees,
            adapters=transformer.adapters(run.model),
            seed=run.seed,
            steps=run.steps,
            guidance=guidance,
            cfg=run.cfg,
            sampler=run.sampler,
            decode=weights is not None,
            preview=weights is not None,
        )

    def renew() -> None:
        transformer.renew()
        if vae is not None:
            renew_shared(transformer.link, vae.first_stage_model)

    outputs = run_on_ranks(transformer.link, make_job, tensors, renew, on_step=on_step)
    latent = {**run.latent, "samples": outputs["latent"]}
    return latent, outputs.get("image")


def shared_vae(vae: Any) -> str:
    """The fingerprint of a VAE's component. Raises RuntimeError if it is not shared."""
    shared = SharedWeights.of(vae.first_stage_model)
    if shared is None or not shared.attachments:
        raise RuntimeError(
            "this VAE is not shared with the daemon: load it with Load VAE (xDiT), or put XDiT "
            "Share behind its loader"
        )
    return shared.attachments[0].component.fingerprint


def run_vae(link: Link, vae: Any, job: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Decode or encode with the ranks; ``job`` is the class of the message.

    Raises RuntimeError with what to do about it.
    """
    compute = COMPUTE[vae.vae_dtype]

    def make_job() -> Any:
        return job(components={"vae": shared_vae(vae)}, tensors=[], compute=compute)

    renew = partial(renew_shared, link, vae.first_stage_model)
    (output,) = run_on_ranks(link, make_job, {name: tensor}, renew).values()
    return output


def _make_tensors(run: Run) -> dict[str, torch.Tensor]:
    latent = comfy.sample.fix_empty_latent_channels(run.model, run.latent["samples"])
    # ComfyUI's own schedule, so that each of its schedulers and samplings works.
    sigmas = comfy.samplers.KSampler(
        run.model,
        steps=run.steps,
        device=torch.device("cpu"),
        sampler=run.sampler,
        scheduler=run.scheduler,
        denoise=run.denoise,
        model_options=run.model.model_options,
    ).sigmas
    tensors = {
        "latent": latent.float(),
        "noise": comfy.sample.prepare_noise(latent, run.seed).float(),
        "sigmas": sigmas.float().cpu(),
    }
    if (mask := run.latent.get("noise_mask")) is not None:
        tensors["mask"] = mask.float()
    for prefix, conditioning in (("", run.positive), ("negative_", run.negative)):
        if prefix and run.cfg == 1:
            continue
        context, options = conditioning[0]
        tensors[f"{prefix}context"] = context.float()
        if (pooled := options.get("pooled_output")) is not None:
            tensors[f"{prefix}y"] = pooled.float()
    return tensors


def _compute_of(model: Any) -> m.ComputeDtype:
    base = model.model
    return COMPUTE[base.manual_cast_dtype or base.get_dtype()]


def _picture_of(preview: torch.Tensor | None) -> Any:
    if preview is None:
        return None
    from PIL import Image

    return ("JPEG", Image.fromarray(preview.numpy()), _PREVIEW_PIXELS)
