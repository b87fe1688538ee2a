"""A custom node pack for the stage ``comfyui``: where shared parameters lie, as ComfyUI sees it."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch


class Probe:
    """Loads a VAE and a CLIP, and counts their parameters inside and outside of regions.

    ``after`` takes a latent: what has to run before this.
    """

    CATEGORY = "test"
    FUNCTION = "probe"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {"model": "MODEL", "clip": "CLIP", "vae": "VAE", "after": "LATENT"}
        return {"required": {}, "optional": {name: (kind,) for name, kind in kinds.items()}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def probe(
        self, model: Any = None, clip: Any = None, vae: Any = None, after: Any = None
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"model": None if model is None else type(model).__name__}
        patchers = {"clip": clip and clip.patcher, "vae": vae and vae.patcher}
        for name, patcher in patchers.items():
            if patcher is not None:
                comfy.model_management.load_models_gpu([patcher], force_full_load=True)
                found[name] = _describe(patcher)
        found["torch"] = _torch_memory()
        return {"ui": {"probe": [found]}}


def _describe(patcher: Any) -> dict[str, Any]:
    shared = getattr(patcher.model, "xdit_shared_weights", None)
    held = [] if shared is None else shared.attachments
    inside, outside = [0, 0], [0, 0]
    strays = []
    for name, tensor in patcher.model.named_parameters():
        within = any(
            each.contains(tensor.data_ptr())
            and each.contains(tensor.data_ptr() + tensor.nbytes - 1)
            for each in held
        )
        counter = inside if within else outside
        counter[0] += 1
        counter[1] += tensor.nbytes
        if not within:
            strays.append(f"{name} {tensor.dtype} {tensor.device}")
    return {
        "patcher": type(patcher).__name__,
        "load_device": str(patcher.load_device),
        "regions": [[each.region, each.mapping.address, each.nbytes] for each in held],
        "inside": inside,
        "outside": outside,
        "strays": strays[:4],
    }


def _torch_memory() -> dict[str, Any]:
    if not torch.cuda.is_available() or comfy.model_management.is_device_cpu(
        comfy.model_management.get_torch_device()
    ):
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "allocator": torch.cuda.get_allocator_backend(),
    }


NODE_CLASS_MAPPINGS = {"XDiTBenchProbe": Probe}
