"""Whole runs of a sampler in the daemon, and the VAE's work there."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from PIL import Image

from ..protocol import messages as m
from ..protocol.client.attachment import Attachment
from ..protocol.errors import SidecarError
from .link import Link, explain
from .ranks_jobs import COMPUTE, run_on_ranks
from .remote_model import RemoteTransformer
from .shared_weights import SharedWeights
from .sharing import renew_shared, share_clip
from .whole_runs import GUIDANCE, RATIO, Run, is_guided, sigmas_of

_PREVIEW_PIXELS = 512


def sample(
    run: Run, vae: Any | None = None, clip: Any | None = None
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The run, in the daemon: the LATENT and, with a shared ``vae``, its picture (B, H, W, 3).

    A ``clip`` is shared if it is not yet. Progress and previews go to the node. Raises RanksFailed,
    or another RuntimeError, with what to do about it.
    """
    transformer: RemoteTransformer = run.model.model.diffusion_model
    if vae is not None:
        shared_vae(vae)  # or it is told before anything else is done
    if clip is not None:
        keep_shared(transformer.link, clip)
    tensors = _make_tensors(run)
    compute, guidance = _compute_of(run.model), run.positive[0][1].get("guidance", GUIDANCE)
    device = run.model.load_device
    previewer = latent_preview.get_previewer(device, run.model.model.latent_format)
    bar = comfy.utils.ProgressBar(run.steps)

    def on_step(step: int, steps: int, preview: torch.Tensor | None) -> None:
        if preview is None:
            picture = None
        elif vae is None:
            latent = preview[None].to(device)
            picture = previewer.decode_latent_to_preview_image("JPEG", latent)
        else:
            picture = ("JPEG", Image.fromarray(preview.numpy()), _PREVIEW_PIXELS)
        if step:
            bar.update_absolute(step, steps, picture)

    def make_job() -> m.Generate:
        components = {} if vae is None else _spread_vae(transformer.link, vae)
        return m.Generate(
            components={**transformer.components(), **components},
            tensors=[],
            compute=compute,
            fp8_matmul=transformer.fp8_matmul,
            degrees=transformer.degrees,
            adapters=transformer.adapters(run.model),
            seed=run.seed,
            steps=run.steps,
            guidance=guidance,
            cfg=run.cfg,
            sampler=run.sampler,
            decode=vae is not None,
            preview=previewer is not None,
        )

    def renew() -> None:
        transformer.renew()
        if vae is not None:
            renew_shared(transformer.link, vae.first_stage_model)

    outputs = run_on_ranks(transformer.link, make_job, tensors, renew, on_step=on_step)
    latent = {key: value for key, value in run.latent.items() if key != RATIO}
    return {**latent, "samples": outputs["latent"]}, outputs.get("image")


def keep_shared(link: Link, clip: Any) -> None:
    """Have a CLIP's weights in the daemon, as XDiT Share does. Raises RuntimeError."""
    try:
        share_clip(link, clip)
    except SidecarError as error:
        raise RuntimeError(explain(error)) from None


def shared_vae(vae: Any) -> Attachment:
    """A VAE's component. Raises RuntimeError if it is not shared."""
    shared = SharedWeights.of(vae.first_stage_model)
    if shared is None or not shared.attachments:
        raise RuntimeError(
            "this VAE is not shared with the daemon: load it with Load VAE (xDiT), or put XDiT "
            "Share behind its loader"
        )
    return shared.attachments[0]


def _spread_vae(link: Link, vae: Any) -> dict[str, str]:
    """The component of a job, resident wherever the ranks work."""
    weights = shared_vae(vae)
    link.spread(weights)
    return {"vae": weights.component.fingerprint}


def run_vae(link: Link, vae: Any, job: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Decode or encode with the ranks; ``job`` is the class of the message.

    Raises RuntimeError with what to do about it.
    """
    compute = COMPUTE[vae.vae_dtype]

    def make_job() -> Any:
        return job(components=_spread_vae(link, vae), tensors=[], compute=compute)

    renew = partial(renew_shared, link, vae.first_stage_model)
    (output,) = run_on_ranks(link, make_job, {name: tensor}, renew).values()
    return output


def _make_tensors(run: Run) -> dict[str, torch.Tensor]:
    latent = comfy.sample.fix_empty_latent_channels(run.model, run.latent["samples"])
    tensors = {
        "latent": latent.float(),
        "noise": comfy.sample.prepare_noise(latent, run.seed).float(),
        "sigmas": sigmas_of(run),
    }
    if (mask := run.latent.get("noise_mask")) is not None:
        tensors["mask"] = mask.float()
    for prefix, conditioning in (("", run.positive), ("negative_", run.negative)):
        if prefix and not is_guided(run):
            continue
        context, options = conditioning[0]
        tensors[f"{prefix}context"] = context.float()
        if (pooled := options.get("pooled_output")) is not None:
            tensors[f"{prefix}y"] = pooled.float()
    return tensors


def _compute_of(model: Any) -> m.ComputeDtype:
    base = model.model
    return COMPUTE[base.manual_cast_dtype or base.get_dtype()]
