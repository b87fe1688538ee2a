"""A whole picture by two ranks equals the one that ComfyUI draws from the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfyui_checkout
import pytest
import torch
from comfy_flux_arguments import module_arguments
from picture_scene import (
    GUIDANCE,
    HEIGHT,
    STEPS,
    TINY,
    WIDTH,
    PipelineFiles,
    drawing,
    ids_of,
    negative,
)
from ranks.components.test_parity import comfyui_sizes
from ranks_scene import RanksScene
from safetensors.torch import load_file, save_file

PROGRAM = Path(__file__).with_name("comfy_picture.py")
PIXELS = 1e-3  # of pictures from 0 to 1
SEED = 42


def draw_with_comfyui(files: PipelineFiles, folder: Path, cfg: float) -> dict[str, torch.Tensor]:
    """ "samples" and "image" of ``ids_of(0)``, not ``ids_of(1)``."""
    comfyui = comfyui_checkout.comfyui()
    pipeline = files.pipeline
    inputs = {"latent": torch.zeros(1, 16, HEIGHT // 8, WIDTH // 8)}
    for number in range(2):
        ids = ids_of(number)
        inputs |= {f"clip{number}": ids["clip_l_ids"], f"t5{number}": ids["t5_ids"]}
    given, output = folder / "inputs.safetensors", folder / "picture.safetensors"
    save_file(inputs, given)
    paths = {role: str(path) for role, path in files.paths.items()}

    def part(model: Any, role: str, dtype: str) -> dict[str, Any]:
        sizes = comfyui_sizes(model, files.paths[role])
        return {"weights": paths[role], "sizes": sizes, "dtype": dtype}

    job = {
        "clip": part(pipeline.clip, "clip_l", "float16"),
        "t5": part(pipeline.t5, "t5", "float32"),
        "vae": {**part(pipeline.vae, "vae", "float32"), "tile": 64, "overlap": 16},
        "sampling": {
            **{"weights": paths["transformer"], "model": module_arguments(pipeline.flux)},
            **{"inputs": str(given), "output": str(folder / "samples.safetensors")},
            **{"seed": SEED, "steps": STEPS, "cfg": cfg, "guidance": GUIDANCE, "denoise": 1.0},
            **{"sampler": "euler", "scheduler": "simple"},
            **{"start": None, "stop": None, "batch_index": None},
        },
        "output": str(output),
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "job.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(output)


@pytest.mark.parametrize("cfg", [1.0, 2.5], ids=["plain", "cfg"])
def test_a_picture_equals_comfyui(scene: RanksScene, tmp_path: Path, cfg: float) -> None:
    files = TINY.write(tmp_path)
    theirs = draw_with_comfyui(files, tmp_path, cfg)
    with scene.daemon.client("drawer") as client, drawing(client, files) as drawer:
        inputs = {**ids_of(), **negative(ids_of(1))}
        ours = drawer.draw(inputs, seed=SEED, cfg=cfg)
    error = (ours["image"] - theirs["image"]).abs().max().item()
    print(f"cfg {cfg}: {error:.1e}")
    assert theirs["image"].std() > 0.05
    assert error <= PIXELS
    assert (ours["latent"] - theirs["samples"]).abs().max().item() <= PIXELS
