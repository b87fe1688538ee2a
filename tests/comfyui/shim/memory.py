"""Has ComfyUI manage host memory as if it were a GPU's, where an environment variable says so.

``TEST_SHIM_VRAM`` is the name of a VRAMState. Where both devices are the CPU ComfyUI moves nothing
and never looks for room. Here models are offloaded to "cpu:0", to which torch moves by copying, and
every load goes through the search for room that loads to GPUs go through.
"""

from __future__ import annotations

import os
from itertools import count
from typing import Any

import comfy.model_management as management
import torch

FREE = 8 << 30  # bytes, always: what others use must not decide
SHORT = 64 << 10  # of a slight shortage, so that models are unloaded partly
_HERE = torch.device("cpu")
_AWAY = torch.device("cpu:0")


def pretend() -> None:
    """From here on, if it is asked for."""
    if (state := os.environ.get("TEST_SHIM_VRAM")) is None:
        return
    management.vram_state = management.VRAMState[state]
    for model in ("unet", "vae", "text_encoder"):
        setattr(management, f"{model}_offload_device", lambda: _AWAY)
    management.get_free_memory = _free
    management.load_models_gpu = _searching_for_room(management.load_models_gpu)


def _free(dev: Any = None, torch_free_too: bool = False) -> Any:
    return (FREE, FREE) if torch_free_too else FREE


def _searching_for_room(original: Any) -> Any:
    calls = count()
    is_device_cpu = management.is_device_cpu

    def load_models_gpu(models: Any, memory_required: float = 0, **others: Any) -> Any:
        extra = max(
            management.minimum_inference_memory(),
            memory_required + management.extra_reserved_memory(),
        )
        slight = next(calls) % 2  # every other time
        management.free_memory(FREE + SHORT if slight else extra, _HERE)
        management.is_device_cpu = lambda device: False
        try:
            return original(models, memory_required, **others)
        finally:
            management.is_device_cpu = is_device_cpu

    return load_models_gpu
