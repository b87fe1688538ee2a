"""Forwards of ComfyUI's own FLUX.1, in a process of its own.

``python comfy_flux_forward.py COMFYUI JOBS``: JOBS is a JSON list; each entry names the files of
weights (BFL layout, no prefix), of inputs (x, timestep, context, y, guidance, ref_latent) and of
the output, the module's arguments, and the stored and the compute dtype as torch names them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main(comfyui: str, jobs: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv[1:] = []
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before model_management looks for a GPU
    for job in json.loads(Path(jobs).read_text()):
        forward(job)


def forward(job: dict[str, Any]) -> None:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    stored, compute = (getattr(torch, job[name]) for name in ("stored", "compute"))
    weights = load_file(job["weights"])
    inputs = load_file(job["inputs"])
    marker = weights.pop("scaled_fp8", None)
    operations = comfy.ops.pick_operations(
        stored, compute, scaled_fp8=None if marker is None else stored
    )
    model = Flux(dtype=stored, device="cpu", operations=operations, **job["arguments"])
    wrong = model.load_state_dict(weights, strict=False)
    # Scales of activations belong to multiplying in fp8, which no CPU does.
    names = (*wrong.unexpected_keys, *wrong.missing_keys)
    different = [name for name in names if not name.endswith(".scale_input")]
    assert not different, different
    reference = inputs.get("ref_latent")
    with torch.no_grad():
        output = model(
            inputs["x"],
            inputs["timestep"],
            inputs["context"],
            y=inputs["y"],
            guidance=inputs.get("guidance"),
            ref_latents=None if reference is None else [reference],
            transformer_options={},
        )
    save_file({"output": output.contiguous()}, job["output"])


if __name__ == "__main__":
    main(*sys.argv[1:])
