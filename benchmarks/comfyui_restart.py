"""A real ComfyUI that was killed and started again: what it still has to load, and how long."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import flux_files
import page_cache
from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import LOADER, SHARED, NodesScene, running_nodes
from comfyui.workflows import Settings
from figures import Figure, percentile

ROUNDS = 3
# About 400 MB, wide enough to be read as a real one is, and quick to sample a few tokens with.
_MODEL = flux_files.Flux(
    heads=8,
    head_size=128,
    double=2,
    single=2,
    context=tiny_checkpoints.T5_SIZES.width,
    pooled=tiny_checkpoints.CLIP_SIZES.width,
    channels=64,
    inputs=64,
)
_FILE = "bench-flux.safetensors"
_NODES = replace(SHARED, model_inputs={**LOADER, "unet_name": _FILE})
_LOADERS = ("model", "clip", "vae")
_QUICK = Settings(steps=1, width=64, height=64)
_SLOW = replace(_QUICK, steps=2000)


class Prompt(NamedTuple):
    """What one took: seconds, of these in loaders, and bytes of weight files that were read."""

    seconds: float
    loading: float
    nbytes: int


def measure() -> list[Figure]:
    """The same prompt in a fresh ComfyUI of a fresh daemon, and after the SIGKILL; cold files."""
    weights = flux_files.random_weights(_MODEL, seed=1)
    before, after = [], []
    for _ in range(ROUNDS):
        with (
            tempfile.TemporaryDirectory() as name,
            running_nodes(Path(name, "scene"), 1) as scene,
        ):
            flux_files.write(scene.server.base / "models" / "diffusion_models" / _FILE, weights)
            before.append(_run(scene))
            _kill_while_it_samples(scene)
            scene.server.start()
            after.append(_run(scene))
    first, again = (_median(prompts) for prompts in (before, after))
    return [
        Figure("loaders of a first ComfyUI p50", first.loading, "s"),
        Figure("loaders after SIGKILL p50", again.loading, "s"),
        Figure("loaders after SIGKILL / first", again.loading / first.loading, "x", 1.0),
        Figure("prompt after SIGKILL / first", again.seconds / first.seconds, "x", 1.0),
        Figure("weights read by a first ComfyUI", first.nbytes / 2**20, "MiB"),
        # Headers, and what the kernel reads ahead.
        Figure("weights read after SIGKILL / first", again.nbytes / first.nbytes, "x", 0.05),
    ]


def _run(scene: NodesScene) -> Prompt:
    models = scene.server.base / "models"
    files = [
        models / "diffusion_models" / _FILE,
        models / "text_encoders" / tiny_checkpoints.CLIP_L,
        models / "text_encoders" / tiny_checkpoints.T5XXL,
        models / "vae" / tiny_checkpoints.AUTOENCODER,
    ]
    for file in files:
        page_cache.forget(file)
    with scene.server.listen() as listener:
        scene.server.run(workflows.text_to_image(_NODES, _QUICK), listener)
        begun = [(event.at, event.data["node"]) for event in listener.named("executing")]
    ends = [at for at, _ in begun[1:]]
    spent = [(end - at, node) for (at, node), end in zip(begun, ends, strict=False)]
    return Prompt(
        begun[-1][0] - begun[0][0],
        sum(seconds for seconds, node in spent if node in _LOADERS),
        sum(map(page_cache.cached_bytes, files)),
    )


def _kill_while_it_samples(scene: NodesScene) -> None:
    with scene.server.listen() as listener:
        workflow = workflows.text_to_image(_NODES, _SLOW, picture=False)
        scene.server.queue(workflow, listener.client_id)
        listener.wait_for(lambda e: e.name == "progress" and e.data["node"] == "sampler")
        scene.server.kill()


def _median(prompts: list[Prompt]) -> Prompt:
    return Prompt(*(percentile(list(column), 50) for column in zip(*prompts, strict=True)))
