"""Whole denoising runs against ComfyUI's KSampler, and the schedules and noise they begin with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import comfyui_checkout
import flux_files
import pytest
import torch
from comfy_flux_arguments import module_arguments
from flux_files import Flux
from flux_inputs import Inputs
from safetensors.torch import load_file, save_file
from xdit_sidecar.daemon.ranks.flux.latents import from_tokens, to_inputs
from xdit_sidecar.daemon.ranks.flux.model import LoadedFlux, build_flux
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.daemon.ranks.sampling.sampler import Denoising
from xdit_sidecar.daemon.ranks.sampling.schedule import flux_sigmas

PROGRAM = Path(__file__).with_name("comfy_sampling.py")
DEV = Flux(double=1, single=1)
SCHNELL = Flux(double=1, single=1, guidance=False)
PARITY = 1e-5
GUIDANCE = 3.5


@dataclass(frozen=True)
class Run:
    """What KSampler is given."""

    flux: Flux = DEV
    batch: int = 1
    size: tuple[int, int] = (8, 6)
    picture: bool = False
    mask: tuple[int, ...] | None = None
    seed: int = 42
    steps: int = 5
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    start: int | None = None
    stop: int | None = None
    batch_index: tuple[int, ...] | None = None


RUNS = {
    "txt2img": Run(),
    "txt2img normal": Run(scheduler="normal"),
    "schnell": Run(SCHNELL, steps=4),
    "schnell normal": Run(SCHNELL, steps=4, scheduler="normal"),
    "img2img": Run(picture=True, denoise=0.6),
    "img2img normal": Run(picture=True, denoise=0.6, scheduler="normal"),
    "whole img2img": Run(picture=True),
    "cfg": Run(cfg=2.5),
    "batch": Run(batch=2, seed=2**64 - 1),
    "batch indices": Run(batch=3, batch_index=(4, 1, 4)),
    "odd size": Run(size=(7, 5)),
    "mask": Run(picture=True, mask=(1, 8, 6)),
    "mask without picture": Run(mask=(8, 6)),
    "mask of pixels": Run(picture=True, mask=(1, 1, 64, 48), denoise=0.6),
    "fewer masks than latents": Run(batch=3, picture=True, mask=(2, 16, 12)),
    "everything": Run(
        batch=2, picture=True, mask=(2, 16, 12), cfg=2.5, denoise=0.6, scheduler="normal"
    ),
    "some of the steps": Run(picture=True, steps=6, start=1, stop=4),
    "sgm_uniform": Run(scheduler="sgm_uniform"),
    "heun": Run(sampler="heun", cfg=2.5),
    "heun of some steps": Run(sampler="heun", picture=True, steps=6, start=1, stop=4),
    "dpmpp_2m": Run(sampler="dpmpp_2m", picture=True, mask=(8, 6)),
    "dpmpp_2m of some steps": Run(sampler="dpmpp_2m", picture=True, steps=6, start=2, stop=5),
    "ddim": Run(sampler="ddim", picture=True, mask=(1, 8, 6), denoise=0.6),
}
SCHEDULES = [
    (kind, shift, scheduler, steps, denoise)
    for kind, shift in (("mu", 1.15), ("mu", 0.5), ("mu", -4.0), ("shift", 1.0), ("shift", 3.0))
    for scheduler, steps, denoise in product(
        ("simple", "normal", "sgm_uniform"), (1, 4, 7, 20, 33), (1.0, 0.99995, 0.6, 0.31, 0.0)
    )
]


def inputs_of(run: Run) -> Inputs:
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (run.batch, run.flux.latent_channels, *run.size)
    inputs = {"latent": 2 * normal(*shape) if run.picture else torch.zeros(shape)}
    for i in range(2):
        inputs[f"context{i}"] = normal(1, 7, run.flux.context)
        inputs[f"y{i}"] = normal(1, run.flux.pooled)
    if run.mask is not None:
        inputs["mask"] = torch.rand(run.mask, generator=generator).mul(1.6).clamp(0, 1)
    return inputs


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Run → ComfyUI's noise and samples; "sigmas" → those of all schedules. From one process."""
    comfyui = comfyui_checkout.comfyui()
    folder = tmp_path_factory.mktemp("sampling")
    runs = []
    for number, run in enumerate(RUNS.values()):
        names = ("weights", "inputs", "output")
        paths = {name: str(folder / f"{number}-{name}.safetensors") for name in names}
        flux_files.write(Path(paths["weights"]), flux_files.random_weights(run.flux))
        save_file(inputs_of(run), paths["inputs"])
        settings = {
            name: getattr(run, name)
            for name in ("seed", "steps", "cfg", "sampler", "scheduler", "denoise")
        }
        settings |= {"start": run.start, "stop": run.stop, "batch_index": run.batch_index}
        model = module_arguments(run.flux)
        runs.append({**paths, **settings, "model": model, "guidance": GUIDANCE})
    sigmas = folder / "sigmas.safetensors"
    asked = {"schedules": SCHEDULES, "output": str(sigmas), "runs": runs}
    (folder / "jobs.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = {name: load_file(str(r["output"])) for name, r in zip(RUNS, runs, strict=True)}
    return {**outputs, "sigmas": load_file(sigmas)}


def loaded(flux: Flux) -> LoadedFlux:
    config = flux_files.detect(flux_files.entries_of(flux))
    return build_flux(config, flux_files.random_weights(flux), torch.float32)


class Velocity:
    """The tiny model's, for one or both prompts."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.flux = loaded(run.flux)
        self.inputs = inputs
        self.both = run.cfg != 1

    def __call__(
        self, latent: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not self.both:
            return self.of_prompt(0, latent, sigma)
        return self.of_prompt(0, latent, sigma), self.of_prompt(1, latent, sigma)

    def of_prompt(self, i: int, latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        batch = latent.shape[0]
        given, placement = to_inputs(
            self.flux.config,
            latent,
            sigma,
            self.inputs[f"context{i}"].expand(batch, -1, -1),
            self.inputs[f"y{i}"].expand(batch, -1),
            torch.full((batch,), GUIDANCE),
            compute_dtype=torch.float32,
        )
        (tokens,) = self.flux.model(**vars(given), return_dict=False)
        return from_tokens(tokens, placement)


@pytest.mark.parametrize("name", RUNS)
def test_run_equals_comfyui(theirs: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    run = RUNS[name]
    inputs = inputs_of(run)
    shape = inputs["latent"].shape
    noise = seeded_noise(shape, run.seed, batch_index=run.batch_index)
    assert torch.equal(noise, theirs[name]["noise"])
    sigmas = flux_sigmas(
        run.steps,
        **({} if run.flux.guidance else {"shift": 1.0}),  # type: ignore[arg-type]
        scheduler=run.scheduler,
        denoise=run.denoise,
    )
    if run.start is not None and run.stop is not None:
        sigmas = sigmas[run.start : run.stop + 1]
    denoising = Denoising.start(
        noise,
        sigmas,
        latent=inputs["latent"],
        mask=inputs.get("mask"),
        mask_noise=seeded_noise(shape, run.seed + 1) if run.sampler == "ddim" else None,
        cfg=run.cfg,
        sampler=run.sampler,
    )
    velocity = Velocity(run, inputs)
    while not denoising.done:
        denoising.step(velocity)
    ours, expected = denoising.result(), theirs[name]["samples"]
    assert ours.shape == expected.shape
    assert expected.std() > 0.5
    assert (ours - expected).abs().max().item() <= PARITY


def test_schedules_equal_comfyui(theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    for number, (kind, shift, scheduler, steps, denoise) in enumerate(SCHEDULES):
        ours = flux_sigmas(steps, **{kind: shift}, scheduler=scheduler, denoise=denoise)  # type: ignore[arg-type]
        assert torch.equal(ours, theirs["sigmas"][str(number)]), SCHEDULES[number]
