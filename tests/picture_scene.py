"""Tiny FLUX.1 pipelines as files, pictures drawn by the ranks, and the same in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flux_files
import torch
from flux_files import Flux
from flux_inputs import Inputs, run_diffusers
from ranks.components import component_files
from ranks.components.component_files import T5, Clip, SmallVae
from safetensors.torch import save_file
from xdit_sidecar.daemon.commands.console import make_console
from xdit_sidecar.daemon.commands.residence import make_resident, work_devices
from xdit_sidecar.daemon.models.flux_detection import detect_flux_file
from xdit_sidecar.daemon.models.text_encoder_detection import detect_clip, detect_t5
from xdit_sidecar.daemon.models.vae_detection import detect_vae
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.daemon.ranks.sampling.sampler import Denoising
from xdit_sidecar.daemon.ranks.sampling.schedule import flux_sigmas
from xdit_sidecar.daemon.ranks.text_encoders.clip import build_clip
from xdit_sidecar.daemon.ranks.text_encoders.t5 import build_t5
from xdit_sidecar.daemon.ranks.vae.model import Vae, build_vae
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.remote import RemoteRanks
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

ROLES = ("transformer", "vae", "clip_l", "t5")
EXACT = 1e-4  # of latents and pictures after a few steps, fp32 summed in another order
GUIDANCE = 3.5
WIDTH, HEIGHT, STEPS = 96, 128, 3


@dataclass(frozen=True)
class Pipeline:
    """Sizes of parts that fit together."""

    flux: Flux = field(
        default=Flux(heads=4, double=1, single=2, context=48, pooled=64, channels=64, inputs=64)
    )
    vae: SmallVae = field(default_factory=SmallVae)
    # ComfyUI's code has CLIP-L's vocabulary built in.
    clip: Clip = field(default_factory=lambda: Clip(layers=1))
    t5: T5 = field(default_factory=lambda: T5(layers=1))

    @property
    def schnell(self) -> Pipeline:
        """The same without guidance."""
        return replace(self, flux=replace(self.flux, guidance=False))

    def tensors(self, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
        """Role → the weights as files keep them."""
        random = component_files.random_weights
        return {
            "transformer": flux_files.random_weights(self.flux, seed),
            "vae": random(self.vae.shapes(), seed + 1),
            "clip_l": component_files.store(random(self.clip.shapes(), seed + 2), "F16"),
            "t5": random(self.t5.shapes(), seed + 3),
        }

    def write(self, directory: Path, name: str = "tiny", seed: int = 0) -> PipelineFiles:
        """A file for each part."""
        paths = {}
        for role, tensors in self.tensors(seed).items():
            paths[role] = directory / f"{name}-{role}.safetensors"
            save_file(tensors, paths[role])
        return PipelineFiles(self, paths)


TINY = Pipeline()


@dataclass
class PipelineFiles:
    """The files of a pipeline, and what one process makes of them without the daemon."""

    pipeline: Pipeline
    paths: dict[str, Path]

    def tensors(self, role: str) -> dict[str, torch.Tensor]:
        return flux_files.map_file(self.paths[role])[0]

    @cached_property
    def _flux(self) -> torch.nn.Module:
        with SafetensorsFile.open(self.paths["transformer"]) as file:
            config = detect_flux_file(file)
        return build_flux(config, self.tensors("transformer"), torch.float32).model

    @cached_property
    def vae(self) -> Vae:
        tensors = self.tensors("vae")
        config = detect_vae(component_files.specs_of(tensors), "vae")
        return build_vae(config, tensors, torch.float32)

    def encode_text(self, ids: Inputs) -> Inputs:
        """ "context" and "y" of "clip_l_ids" and "t5_ids"."""
        clip, t5 = self.tensors("clip_l"), self.tensors("t5")
        specs_of = component_files.specs_of
        clip_encoder = build_clip(detect_clip(specs_of(clip), "clip"), clip)
        t5_encoder = build_t5(detect_t5(specs_of(t5), "t5"), t5)
        pooled = clip_encoder.encode(ids["clip_l_ids"]).pooled
        return {"context": t5_encoder.encode(ids["t5_ids"]), "y": pooled}

    def draw(
        self, prompt: Inputs, noise: torch.Tensor, *, negative: Inputs | None = None, **given: Any
    ) -> torch.Tensor:
        """The latent of a prompt's conditioning; ``given`` are Denoising's, and "guidance"."""
        guidance = given.pop("guidance", GUIDANCE)
        denoising = Denoising.start(noise, given.pop("sigmas", self.sigmas()), **given)

        def velocity(x: torch.Tensor, sigma: torch.Tensor, text: Inputs) -> torch.Tensor:
            rows = x.shape[0]
            inputs = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in text.items()}
            inputs |= {"x": x, "timestep": sigma}
            if self.pipeline.flux.guidance:
                inputs["guidance"] = torch.full((rows,), guidance)
            return run_diffusers(self._flux, inputs)

        def model(x: torch.Tensor, sigma: torch.Tensor) -> Any:
            if negative is None:
                return velocity(x, sigma, prompt)
            return velocity(x, sigma, prompt), velocity(x, sigma, negative)

        while not denoising.done:
            denoising.step(model)
        return denoising.result()

    def sigmas(self, steps: int = STEPS, **given: Any) -> torch.Tensor:
        """The model's own schedule."""
        if not self.pipeline.flux.guidance:
            given["shift"] = 1.0
        return flux_sigmas(steps, **given)


def ids_of(
    seed: int = 0, *, rows: int = 1, words: int = 5, length: int = 9, pipeline: Pipeline = TINY
) -> Inputs:
    """Token ids of a prompt of so many words, T5's padded to ``length``."""
    generator = torch.Generator().manual_seed(seed)
    end = pipeline.clip.vocabulary - 1
    clip = torch.full((rows, pipeline.clip.positions), end)
    clip[:, 0] = end - 1
    clip[:, 1 : words + 1] = torch.randint(0, end - 1, (rows, words), generator=generator)
    t5 = torch.zeros((rows, length), dtype=torch.int64)
    t5[:, :words] = torch.randint(2, pipeline.t5.vocabulary, (rows, words), generator=generator)
    t5[:, words] = 1
    return {"clip_l_ids": clip, "t5_ids": t5}


def negative(inputs: Inputs) -> Inputs:
    """The same as what the picture is not to show."""
    return {f"negative_{name}": tensor for name, tensor in inputs.items()}


def noise_of(seed: int, batch: int = 1) -> torch.Tensor:
    """What a seed stands for at WIDTH by HEIGHT."""
    return seeded_noise((batch, 16, HEIGHT // 8, WIDTH // 8), seed)


@dataclass
class Drawer:
    """A client that leases all parts of a pipeline."""

    client: Client
    components: dict[str, str]
    ranks: RemoteRanks

    def job(self, *without: str, **more: Any) -> m.Generate:
        """A picture; ``without`` are roles that the job does not name."""
        named = {role: key for role, key in self.components.items() if role not in without}
        settings: dict[str, Any] = {
            **{"components": named, "compute": "F32", "guidance": GUIDANCE},
            **{"width": WIDTH, "height": HEIGHT, "steps": STEPS},
        }
        return m.Generate(tensors=[], **{**settings, **more})

    def draw(self, tensors: Mapping[str, torch.Tensor], *without: str, **more: Any) -> Inputs:
        """ "latent" and perhaps "image"."""
        options = {
            name: more.pop(name) for name in ("on_step", "should_cancel", "timeout") if name in more
        }
        return self.ranks.run(self.job(*without, **more), tensors, **options)

    def only(self, *roles: str) -> dict[str, str]:
        """The components that play these roles."""
        return {role: self.components[role] for role in roles}


@contextlib.contextmanager
def drawing(client: Client, files: PipelineFiles) -> Iterator[Drawer]:
    """The pipeline resident where the ranks work, leased until the end of the block."""
    devices = work_devices(client)
    held = [
        resident
        for path in files.paths.values()
        for resident in make_resident(client, path, devices, console=make_console())
    ]
    assert [resident.role for resident in held] == list(ROLES)
    components = {resident.role: resident.attachment.component.fingerprint for resident in held}
    try:
        yield Drawer(client, components, RemoteRanks(client))
    finally:
        for resident in held:
            resident.attachment.release()
