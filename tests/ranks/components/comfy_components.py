"""ComfyUI's own text encoders and VAE, in a process of its own.

``python comfy_components.py COMFYUI JOBS``: JOBS is a JSON list; each entry names what to run, the
files of weights, of inputs and of the output, and what tiny models need to be told.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import comfy_process

Tensors = dict[str, torch.Tensor]


def main(comfyui: str, jobs: str) -> None:
    comfy_process.enter(comfyui)
    runs = {"clip": run_clip, "t5": run_t5, "vae": run_vae}
    for job in json.loads(Path(jobs).read_text()):
        with torch.no_grad():
            output = runs[job["kind"]](job, load_file(job["weights"]), load_file(job["inputs"]))
        save_file({name: part.contiguous() for name, part in output.items()}, job["output"])


def run_clip(job: dict[str, Any], weights: Tensors, inputs: Tensors) -> Tensors:
    import comfy.sd1_clip

    model = comfy.sd1_clip.SDClipModel(
        dtype=getattr(torch, job["dtype"]),
        textmodel_json_config=job["sizes"],
        return_projected_pooled=False,
        model_options=_options(weights),
    )
    _load(model, weights)
    hidden, pooled = model.encode(inputs["tokens"].tolist())
    return {"hidden": hidden, "pooled": pooled}


def run_t5(job: dict[str, Any], weights: Tensors, inputs: Tensors) -> Tensors:
    import comfy.sd1_clip
    import comfy.text_encoders.t5

    model = comfy.sd1_clip.SDClipModel(
        dtype=getattr(torch, job["dtype"]),
        textmodel_json_config=job["sizes"],
        special_tokens={"end": 1, "pad": 0},
        model_class=comfy.text_encoders.t5.T5,
        model_options=_options(weights),
    )
    _load(model, weights)
    hidden, _ = model.encode(inputs["tokens"].tolist())
    return {"hidden": hidden}


def _options(weights: Tensors) -> dict[str, Any]:
    marker = weights.get("scaled_fp8")
    return {} if marker is None else {"scaled_fp8": marker.dtype}


def _load(model: Any, weights: Tensors) -> None:
    wrong = model.load_sd(weights)
    missing = {name for name in wrong.missing_keys if not name.startswith("text_projection.")}
    # Scales of activations belong to multiplying in fp8, which no CPU does.
    unknown = {name for name in wrong.unexpected_keys if not name.endswith(".scale_input")}
    different = missing | unknown
    assert not different, different


def run_vae(job: dict[str, Any], weights: Tensors, inputs: Tensors) -> Tensors:
    import comfy.sd

    original = comfy.sd.AutoencodingEngine

    def small(**configs: Any) -> Any:
        for half in ("encoder_config", "decoder_config"):
            configs[half]["params"].update(job["sizes"])
        return original(**configs)

    comfy.sd.AutoencodingEngine = small
    try:
        vae = comfy.sd.VAE(sd=weights, dtype=getattr(torch, job["dtype"]))
    finally:
        comfy.sd.AutoencodingEngine = original
    found: Tensors = {}
    if "latent" in inputs:
        found["image"] = vae.decode(inputs["latent"])
        tile, overlap = job["tile"], job["overlap"]
        found["tiled"] = vae.decode_tiled(
            inputs["latent"], tile_x=tile, tile_y=tile, overlap=overlap
        )
    if "image" in inputs:
        found["latent"] = vae.encode(inputs["image"])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
