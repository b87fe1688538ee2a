"""Calls of ComfyUI's own FLUX.1 with everything that `diffusion_model` takes.

``python comfy_flux_calls.py COMFYUI JOBS``: JOBS is a JSON list; each entry names the files of
weights (BFL layout, no prefix), inputs (x, timestep, context, y, guidance, ref0, ref1, …) and
output, the module's arguments, and perhaps a ``method`` for the references.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from comfy_process import enter
from safetensors.torch import load_file, save_file


def main(comfyui: str, jobs: str) -> None:
    enter(comfyui)
    for job in json.loads(Path(jobs).read_text()):
        call(job)


def call(job: dict[str, Any]) -> None:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **job["model"]
    )
    model.load_state_dict(load_file(job["weights"]), strict=True)
    inputs = load_file(job["inputs"])
    references = [inputs[name] for name in sorted(inputs) if name.startswith("ref")]
    method = {} if job["method"] is None else {"ref_latents_method": job["method"]}
    with torch.no_grad():
        output = model(
            inputs["x"],
            inputs["timestep"],
            inputs["context"],
            y=inputs.get("y"),
            guidance=inputs.get("guidance"),
            ref_latents=references or None,
            transformer_options={},
            **method,
        )
    save_file({"output": output.contiguous()}, job["output"])


if __name__ == "__main__":
    main(*sys.argv[1:])
