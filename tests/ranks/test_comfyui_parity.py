"""Our FLUX.1 against ComfyUI's own implementation, on the same files and inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import comfyui_checkout
import flux_files
import pytest
import torch
from flux_files import Flux
from flux_inputs import comfy_inputs, run_diffusers
from safetensors.torch import load_file, save_file
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.flux_detection import detect_flux_file
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

PROGRAM = Path(__file__).with_name("comfy_flux_forward.py")


@dataclass(frozen=True)
class Case:
    """One file and one call."""

    flux: Flux
    dtype: str = "F32"
    scales: str | None = None
    reference: tuple[int, int] | None = None
    compute: torch.dtype = torch.float32


DEEP = Flux(heads=4, head_size=32, double=4, single=8)
CASES = {
    "dev": Case(Flux()),
    "schnell": Case(Flux(guidance=False)),
    "fill": Case(Flux(inputs=288)),
    "kontext": Case(Flux(), reference=(6, 10)),
    "one head of 128": Case(Flux(heads=1, head_size=128, double=1, single=1)),
    "bf16": Case(Flux(), "BF16"),
    "fp8": Case(Flux(), "F8_E4M3"),
    "scaled fp8": Case(Flux(), "F8_E4M3", "scaled_fp8"),
    "deep": Case(DEEP, "BF16"),
    "deep in bf16": Case(DEEP, "BF16", compute=torch.bfloat16),
}


def arguments(config: FluxConfig) -> dict[str, object]:
    """Of ComfyUI's Flux module, whose channels are those of a latent."""
    return {
        "image_model": "flux",
        "in_channels": config.in_channels // 4,
        "out_channels": config.out_channels // 4,
        "vec_in_dim": config.pooled_width,
        "context_in_dim": config.context_width,
        "hidden_size": config.hidden_size,
        "mlp_ratio": config.mlp_ratio,
        "num_heads": config.heads,
        "depth": config.double_blocks,
        "depth_single_blocks": config.single_blocks,
        "axes_dim": list(config.rope_axes),
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": config.guidance,
    }


Outputs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Case → (ours, ComfyUI's); one process of ComfyUI answers them all."""
    comfyui = comfyui_checkout.comfyui()
    folder = tmp_path_factory.mktemp("parity")
    jobs, ours = [], {}
    for number, (name, case) in enumerate(CASES.items()):
        weights, given, out = (
            folder / f"{number}-{kind}.safetensors" for kind in ("weights", "inputs", "output")
        )
        # Biases and norms in the matrices' dtype: to fp8 this ComfyUI would round them anyway.
        stored = flux_files.store(
            flux_files.random_weights(case.flux), case.dtype, scales=case.scales
        )
        flux_files.write(weights, stored)
        inputs = comfy_inputs(case.flux, reference=case.reference, dtype=case.compute)
        save_file(inputs, given)
        with SafetensorsFile.open(weights) as file:
            config = detect_flux_file(file)
        tensors, _ = flux_files.map_file(weights)
        ours[name] = run_diffusers(build_flux(config, tensors, case.compute).model, inputs)
        jobs.append(
            {
                "weights": str(weights),
                "inputs": str(given),
                "output": str(out),
                "arguments": arguments(config),
                "stored": _name(flux_files.TORCH_DTYPES[case.dtype]),
                "compute": _name(case.compute),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: (ours[name], load_file(job["output"])["output"])
        for name, job in zip(CASES, jobs, strict=True)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.compute == torch.float32])
def test_output_equals_comfyui(outputs: Outputs, name: str) -> None:
    ours, theirs = outputs[name]
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_bf16_errs_no_more_than_comfyui(outputs: Outputs) -> None:
    _, exact = outputs["deep"]
    ours, theirs = (
        (output.float() - exact).square().mean().sqrt().item() for output in outputs["deep in bf16"]
    )
    assert 0 < theirs < 0.02 * exact.std().item()
    assert ours < 1.5 * theirs
