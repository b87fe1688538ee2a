"""XDiT KSampler."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import nodes
from comfy_api.latest import io

from ..fallback import Fallback, say
from ..ranks_jobs import RanksFailed
from ..remote_sampling import sample
from ..whole_runs import Run, why_not


class KSampler(io.ComfyNode):
    """KSampler whose whole loop runs in the daemon where it can."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTKSampler",
            display_name="XDiT KSampler",
            category="xDiT",
            description=(
                "Samples like KSampler. With a model of the XDiT UNet Loader and a sampler that "
                "the daemon knows, all steps run there, and with a shared VAE the picture is "
                "decoded there, too; the node says which way it took."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Of the XDiT UNet Loader, or any other."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same noise as in KSampler.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the run."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="1 leaves the negative prompt out, as FLUX.1 dev is meant to be used.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="euler, ddim, heun and dpmpp_2m run in the daemon; the others in "
                    "ComfyUI, with each forward answered by the daemon.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="Which noise levels the run goes through; ComfyUI's own.",
                ),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input("negative", tooltip="What it does not show."),
                io.Latent.Input("latent_image", tooltip="What the run begins with."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 some of the latent is kept.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="A shared VAE: the picture comes out as well, decoded by the ranks.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Shared with the daemon, as by XDiT Share, before it samples.",
                ),
            ],
            outputs=[io.Latent.Output(), io.Image.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float,
        vae: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Sample there, or here."""
        node = cls.hidden.unique_id
        run = Run(
            *(model, positive, negative, latent_image, seed, steps, cfg),
            *(sampler_name, scheduler, denoise),
        )
        if (reason := why_not(run)) is None:
            say(node, "all steps run in the daemon")
            try:
                return io.NodeOutput(*sample(run, vae, clip))
            except RanksFailed as error:
                if (fallback := Fallback.of(model)) is None:
                    raise
                model = fallback.model_here(model, error)
                reason = f"the daemon did not: {error}"
        say(node, f"ComfyUI samples, because {reason}")
        (latent,) = nodes.common_ksampler(
            *(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image),
            denoise=denoise,
        )
        image = None if vae is None else vae.decode(latent["samples"])
        return io.NodeOutput(latent, image)
