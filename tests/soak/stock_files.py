"""A stock workflow in a real ComfyUI without the test shim, with files that stock loaders take."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from comfyui import packs, stock_checkpoints, workflows
from comfyui.nodes_scene import LOADER, SHARED
from comfyui.server import ComfyServer
from comfyui.workflows import STOCK, Nodes, Settings, Workflow
from daemon_process import running_daemon
from PIL import Image
from safetensors.torch import load_file

Figures = dict[str, object]

_SETTINGS = Settings(prompt="a handwritten seven", width=64, height=64, steps=2)
_SAME = 1e-3  # of latents that are about 1: bf16 and fp8 weights, computed with in fp32
_SECONDS = 900.0  # T5-XXL on a CPU
_CLIP = {"clip_name1": stock_checkpoints.CLIP_L, "clip_name2": stock_checkpoints.T5XXL}
_VAE = {"vae_name": stock_checkpoints.AUTOENCODER}
_MODEL = {"unet_name": stock_checkpoints.DIFFUSION_MODEL, "weight_dtype": "default"}
_STOCK = replace(STOCK, model_inputs=_MODEL, clip_inputs={**_CLIP, "type": "flux"}, vae_inputs=_VAE)
_OURS = replace(SHARED, model_inputs={**LOADER, **_MODEL}, clip_inputs=_CLIP, vae_inputs=_VAE)


@dataclass
class _Result:
    """What a workflow saved, and how long it took."""

    latent: torch.Tensor
    picture: np.ndarray[tuple[int, ...], np.dtype[np.int16]]
    seconds: float


def with_stock_files() -> Figures:
    """The same picture by stock loaders alone, and by ours with two ranks."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = stock_checkpoints.install(directory / "base")
        with ComfyServer(directory / "base", shim=False) as server:
            stock = _draw(server, _STOCK, "stock")
        with (
            running_daemon(directory, "--ranks", "2", "--deadline", "120") as daemon,
            ComfyServer(
                directory / "base",
                packs={"xdit_sidecar": packs.clone()},
                environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir)},
                shim=False,
            ) as server,
        ):
            daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
            ours = _draw(server, _OURS, "ours")
            with daemon.client("looker") as client:
                resident = {c.label: c.nbytes for c in client.status().components}
    difference = float((ours.latent - stock.latent).abs().max())
    assert ours.latent.isfinite().all()
    assert difference < _SAME * float(stock.latent.abs().max()), difference
    levels = int(np.abs(ours.picture - stock.picture).max())
    assert levels <= 1, f"pixels differ by {levels} levels"
    assert int(np.ptp(ours.picture)) > 0
    assert len(resident) == len(files), resident
    return {
        "file_bytes": files,
        "resident_bytes": resident,
        "latent_difference": difference,
        "latent_largest": float(stock.latent.abs().max()),
        "pixel_levels_apart": levels,
        "seconds_stock": round(stock.seconds, 1),
        "seconds_ours": round(ours.seconds, 1),
    }


def _draw(server: ComfyServer, nodes: Nodes, save: str) -> _Result:
    assert "TestSaveTensors" not in server.object_info()
    began = time.monotonic()
    server.run(
        _without_the_shim(workflows.text_to_image(nodes, _SETTINGS, save=save)), seconds=_SECONDS
    )
    seconds = time.monotonic() - began
    output = server.base / "output"
    (latent,) = output.glob(f"{save}_*.latent")
    (picture,) = output.glob(f"{save}_*.png")
    with Image.open(picture) as opened:
        pixels = np.asarray(opened, dtype=np.int16)
    return _Result(load_file(latent)["latent_tensor"], pixels, seconds)


def _without_the_shim(workflow: Workflow) -> Workflow:
    """Saved by stock nodes; one prompt is encoded, since nothing reads the other at cfg 1."""
    del workflow["save_tensor"], workflow["negative"]
    workflow["sampler"]["inputs"]["negative"] = ["positive", 0]
    saving = workflow["save_latent"]["inputs"]
    workflow["save_latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": saving["samples"], "filename_prefix": saving["name"]},
    }
    return workflow


STAGES = {"comfyui-stock-files": with_stock_files}
