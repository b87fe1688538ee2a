"""Runs of ComfyUI's own KSampler with its own FLUX.1.

``python comfy_sampling.py COMFYUI JOBS``: JOBS is {"schedules": […], "output": file, "runs": […]}.
A schedule is (kind, shift, scheduler, steps, denoise); the output has the sigmas of each. A run
names the files of weights, inputs and output, the module's arguments, and what KSampler is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from comfy_process import enter


def main(comfyui: str, jobs: str) -> None:
    enter(comfyui)
    asked = json.loads(Path(jobs).read_text())
    sigmas = {str(i): schedule(*entry) for i, entry in enumerate(asked["schedules"])}
    save_file(sigmas, asked["output"])
    for job in asked["runs"]:
        run(job)


def schedule(kind: str, shift: float, scheduler: str, steps: int, denoise: float) -> torch.Tensor:
    import comfy.model_sampling
    import comfy.samplers

    if kind == "mu":
        levels = comfy.model_sampling.ModelSamplingFlux()
        levels.set_parameters(shift=shift)
    else:
        levels = comfy.model_sampling.ModelSamplingDiscreteFlow()
        levels.set_parameters(shift=shift, multiplier=1.0)

    class Model:
        def get_model_object(self, name: str) -> Any:
            return levels

    return comfy.samplers.KSampler(Model(), steps, "cpu", "euler", scheduler, denoise).sigmas


def run(job: dict[str, Any]) -> None:
    import comfy.model_patcher
    import comfy.sample
    import comfy.supported_models

    guided = job["model"]["guidance_embed"]
    kind = comfy.supported_models.Flux if guided else comfy.supported_models.FluxSchnell
    description = kind(job["model"])
    description.set_inference_dtype(torch.float32, None)
    base = description.get_model({})
    base.diffusion_model.load_state_dict(load_file(job["weights"]), strict=True)
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    inputs = load_file(job["inputs"])
    prompts = [
        [[inputs[f"context{i}"], {"pooled_output": inputs[f"y{i}"], "guidance": job["guidance"]}]]
        for i in range(2)
    ]
    noise = comfy.sample.prepare_noise(inputs["latent"], job["seed"], job["batch_index"])
    samples = comfy.sample.sample(
        model,
        noise.clone(),
        job["steps"],
        job["cfg"],
        job["sampler"],
        job["scheduler"],
        *prompts,
        inputs["latent"],
        denoise=job["denoise"],
        start_step=job["start"],
        last_step=job["stop"],
        noise_mask=inputs.get("mask"),
        disable_pbar=True,
        seed=job["seed"],
    )
    save_file({"noise": noise, "samples": samples.contiguous()}, job["output"])


if __name__ == "__main__":
    main(*sys.argv[1:])
