"""A picture by ComfyUI's own code: text encoders, KSampler, VAE decode.

``python comfy_picture.py COMFYUI JOB``: JOB is {"parts": [jobs for clip and t5], "sampling": a run,
"vae": a job, "folder": …}, as the programs for these parts take them; the inputs of one part are
made here from the outputs of the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "components"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sampling"))
import comfy_components
import comfy_process
import comfy_sampling


@torch.no_grad()
def main(comfyui: str, path: str) -> None:
    comfy_process.enter(comfyui)
    job: dict[str, Any] = json.loads(Path(path).read_text())
    sampling = job["sampling"]
    given = load_file(sampling["inputs"])
    for number in range(2):  # what the picture shows, and what not
        for part in ("clip", "t5"):
            wanted = job[part]
            run = getattr(comfy_components, f"run_{part}")
            weights = load_file(wanted["weights"])
            output = run(wanted, weights, {"tokens": given[f"{part}{number}"]})
            if part == "clip":
                given[f"y{number}"] = output["pooled"].contiguous()
            else:
                given[f"context{number}"] = output["hidden"].contiguous()
    save_file(given, sampling["inputs"])
    comfy_sampling.run(sampling)
    samples = load_file(sampling["output"])["samples"]
    vae = job["vae"]
    image = comfy_components.run_vae(vae, load_file(vae["weights"]), {"latent": samples})["image"]
    save_file({"samples": samples, "image": image.contiguous()}, job["output"])


if __name__ == "__main__":
    main(*sys.argv[1:])
