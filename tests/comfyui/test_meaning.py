"""Digits drawn in a real ComfyUI, by the stock sampler with forwards from the daemon, are read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui import workflows
from comfyui.nodes_scene import CODED, LOADER, REMOTE, NodesScene, running_nodes
from comfyui.workflows import STOCK, Nodes, Settings
from digits.pictures import SIDE
from digits.words import prompt
from digits_scene import CFG, FILES, RIGHT, STEPS, reader

pytestmark = pytest.mark.timeout(400)

_MODEL = {"unet_name": FILES["transformer"].name, "weight_dtype": "default"}
_CLIP = {"clip_name1": FILES["clip_l"].name, "clip_name2": FILES["t5"].name}
_VAE = {"vae_name": FILES["vae"].name}


def drawing_digits(nodes: Nodes, **clip: str) -> Nodes:
    """The same nodes with the files that draw digits."""
    model = {**nodes.model_inputs, **_MODEL}
    return replace(nodes, model_inputs=model, clip_inputs={**_CLIP, **clip}, vae_inputs=_VAE)


WAYS = {
    # What the forward service must equal.
    "stock": drawing_digits(STOCK, type="flux"),
    "forwards": drawing_digits(REMOTE, type="flux"),
    "all": drawing_digits(replace(CODED, model_inputs=LOADER)),
}


@contextlib.contextmanager
def running_digits(directory: Path) -> Iterator[NodesScene]:
    """A daemon with two ranks, and a ComfyUI that has the files which draw digits."""
    with running_nodes(directory, 2) as running:
        for path in FILES.values():
            shutil.copy(path, running.server.base / "models" / path.parent.name)
        yield running


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodesScene]:
    with running_digits(tmp_path_factory.mktemp("meaning") / "scene") as running:
        yield running


def draw(
    scene: NodesScene, nodes: Nodes, digit: int, save: str, **settings: object
) -> torch.Tensor:
    """Pictures (batch, 64, 64, 3) of a digit; its prompt is encoded by ComfyUI's own tokenizers."""
    given = Settings(
        prompt=prompt(digit), negative="", width=SIDE, height=SIDE, steps=STEPS, seed=digit
    )
    made = replace(given, **settings)  # type: ignore[arg-type]
    scene.server.run(workflows.text_to_image(nodes, made, save=save), seconds=200)
    return scene.server.tensors(f"{save}-image")["images"]


def read_rightly(scene: NodesScene, way: str, batch: int) -> int:
    """How many pictures are read as what was asked for, of so many for each digit."""
    pictures = [
        draw(scene, WAYS[way], digit, f"{way}{digit}", batch=batch, seed=100 + digit)
        for digit in range(10)
    ]
    digits = [digit for digit in range(10) for _ in range(batch)]
    right = reader().count_right(torch.cat(pictures), digits)
    print(f"read rightly, {way}: {right} of {len(digits)}")
    return right


# Those of the stock nodes are in the soak, with ten for each digit by forwards.
@pytest.mark.parametrize(("way", "batch"), [("forwards", 2), ("all", 1)])
def test_digits_are_what_was_asked_for(scene: NodesScene, way: str, batch: int) -> None:
    assert read_rightly(scene, way, batch) >= RIGHT * 10 * batch


def test_the_same_pictures_as_without_the_daemon(scene: NodesScene) -> None:
    settings = {"batch": 2, "cfg": CFG, "seed": 99}
    stock = draw(scene, WAYS["stock"], 7, "stock", **settings)
    ours = draw(scene, WAYS["forwards"], 7, "ours", **settings)
    assert (ours - stock).abs().max() < 0.05
    assert reader().count_right(ours, [7, 7]) == 2
