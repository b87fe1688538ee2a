"""What ComfyUI's own LoRA code makes of weights.

``python comfy_lora.py COMFYUI JOBS``: JOBS is a JSON list; each entry names the files of weights
(BFL layout, no prefix), of the LoRA and of the patched weights, the model's arguments and the
strength.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from comfy_process import enter
from safetensors.torch import load_file, save_file


def main(comfyui: str, jobs: str) -> None:
    enter(comfyui)
    for job in json.loads(Path(jobs).read_text()):
        patch(job)


def patch(job: dict[str, Any]) -> None:
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base

    weights = load_file(job["weights"])

    class Model(comfy.model_base.Flux):
        """As much of a model as the table of names asks for."""

        def __init__(self) -> None:
            self.model_config = type("Config", (), {"unet_config": job["model"]})()

        def state_dict(self) -> dict[str, Any]:
            return {f"diffusion_model.{name}": tensor for name, tensor in weights.items()}

    names = comfy.lora.model_lora_keys_unet(Model(), {})
    lora = comfy.lora_convert.convert_lora(load_file(job["lora"]))
    for key, adapter in comfy.lora.load_lora(lora, names).items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        own = name.removeprefix("diffusion_model.")
        patches = [(job["strength"], adapter, 1.0, offset, function)]
        weights[own] = comfy.lora.calculate_weight(patches, weights[own].clone(), name)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, job["output"])


if __name__ == "__main__":
    main(*sys.argv[1:])
