"""A stock workflow with our loaders gives the stock loaders' numbers, in a real ComfyUI."""

from __future__ import annotations

import io
from dataclasses import replace

import psutil
import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.cases import CASES, SAME, difference
from comfyui.nodes_scene import (
    CHECKPOINT,
    CODED,
    LOADER,
    QUICK,
    REMOTE,
    SHARED,
    NodesScene,
    sampling,
)
from comfyui.server import WorkflowFailed, WorkflowInterrupted
from comfyui.workflows import STOCK, Nodes, Workflow
from PIL import Image
from xdit_sidecar.protocol import messages as m

pytestmark = pytest.mark.timeout(240)


RANKS = 2


@pytest.mark.parametrize("name", CASES)
def test_one_loader_is_replaced(scene: NodesScene, name: str) -> None:
    build, settings = CASES[name]
    assert difference(scene, build, settings, REMOTE) < SAME


@pytest.mark.parametrize("nodes", [SHARED, CHECKPOINT], ids=["shared", "checkpoint"])
def test_all_loaders_are_replaced(scene: NodesScene, nodes: Nodes) -> None:
    settings = replace(QUICK, seed=11)
    scene.server.run(workflows.text_to_image(STOCK, settings, save="stock"))
    scene.server.run(workflows.text_to_image(nodes, settings, save="ours"))
    stock, ours = (scene.server.tensors(n)["samples"] for n in ("stock", "ours"))
    assert (stock - ours).abs().max() < SAME
    images = [scene.server.tensors(f"{n}-image")["images"] for n in ("stock", "ours")]
    assert (images[0] - images[1]).abs().max() < SAME


def test_text_is_encoded_to_the_bit(scene: NodesScene) -> None:
    for save, nodes in (("stock", STOCK), ("ours", SHARED)):
        scene.server.run(workflows.encode_only(nodes, save=save))
    stock, ours = scene.server.tensors("stock"), scene.server.tensors("ours")
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_our_sampler(scene: NodesScene, sampler: str) -> None:
    settings = replace(QUICK, sampler=sampler, cfg=2.0, seed=5)
    stock = workflows.text_to_image(STOCK, settings, save="stock")
    expected = scene.latent(stock, "stock")
    ours = sampling(workflows.text_to_image(SHARED, settings, save="ours"), vae=True)
    ours["save_picture"] = {
        "class_type": "TestSaveTensors",
        "inputs": {"name": "ours-direct", "images": ["sampler", 1]},
    }
    with scene.server.listen() as listener:
        scene.server.run(ours, listener)
        progress = [event.data["value"] for event in listener.named("progress")]
    found = scene.server.tensors("ours")["samples"]
    assert (found - expected).abs().max() < SAME
    direct = scene.server.tensors("ours-direct")["images"]
    assert (direct - scene.server.tensors("stock-image")["images"]).abs().max() < 1e-3
    assert settings.steps in progress
    way = "all steps run in the daemon" if sampler != "dpmpp_sde" else "the sampler dpmpp_sde"
    assert way in scene.server.log


def test_our_sampler_with_a_plain_model(scene: NodesScene) -> None:
    settings = replace(QUICK, seed=6)
    expected = scene.latent(workflows.text_to_image(STOCK, settings, save="stock"), "stock")
    workflow = sampling(workflows.text_to_image(STOCK, settings, save="plain"))
    assert torch.equal(scene.latent(workflow, "plain"), expected)


def test_coding_by_the_ranks(scene: NodesScene) -> None:
    settings = replace(QUICK, denoise=0.5, seed=8)
    scene.server.run(workflows.image_to_image(STOCK, settings, save="stock"))
    scene.server.run(workflows.image_to_image(CODED, settings, save="ours"))
    for name, key in (("", "samples"), ("-image", "images")):
        stock, ours = (scene.server.tensors(f"{n}{name}")[key] for n in ("stock", "ours"))
        assert (stock - ours).abs().max() < 1e-3


def test_memory_management_does_not_unshare(scene: NodesScene) -> None:
    scene.server.run(workflows.text_to_image(SHARED, replace(QUICK, seed=21)))
    before = regions(scene)
    assert before
    scene.server.free()
    scene.server.run(workflows.text_to_image(SHARED, replace(QUICK, seed=22)))
    entry = scene.server.run(workflows.report(SHARED))
    reported = entry["outputs"]["report"]["parameters"][0]
    text = reported if isinstance(reported, str) else repr(reported)
    assert "meta" not in text
    assert regions(scene) == before


def regions(scene: NodesScene) -> int:
    """How many regions the ComfyUI process has mapped."""
    maps = psutil.Process(scene.server.pid).memory_maps(grouped=False)
    return len({m.path for m in maps if "xdit-sidecar" in m.path})


def test_interrupt_and_what_comes_after(scene: NodesScene) -> None:
    workflow = workflows.text_to_image(REMOTE, replace(QUICK, steps=2000, seed=31), picture=False)
    with scene.server.listen() as listener:
        prompt = scene.server.queue(workflow, listener.client_id)
        listener.wait_for(lambda event: event.name == "progress")
        scene.server.interrupt()
        with pytest.raises(WorkflowInterrupted):
            scene.server.wait(prompt)
    assert difference(scene, workflows.text_to_image, replace(QUICK, seed=32), REMOTE) < SAME


def test_previews_and_progress_as_with_the_stock_sampler(scene: NodesScene) -> None:
    seen = []
    for nodes in (STOCK, REMOTE):
        workflow = workflows.text_to_image(nodes, replace(QUICK, seed=33), picture=False)
        with scene.server.listen() as listener:
            scene.server.run(workflow, listener)
            events = [e for e in listener.events if e.name in ("progress", "preview")]
        ours = [e for e in events if "sampler" in (e.data.get("node"), e.data.get("node_id"))]
        seen.append([(e.name, e.data.get("value"), picture_size(e.image)) for e in ours])
    assert seen[0] == seen[1]
    assert [name for name, _, _ in seen[0]].count("preview") == QUICK.steps


def picture_size(image: bytes) -> tuple[int, int] | None:
    return Image.open(io.BytesIO(image)).size if image else None


def test_what_cannot_be_remote_is_told(scene: NodesScene) -> None:
    def compiled(nodes: Nodes) -> Workflow:
        workflow = workflows.text_to_image(nodes, replace(QUICK, seed=41), picture=False)
        workflow["compiled"] = {
            "class_type": "TorchCompileModel",
            "inputs": {"model": ["model", 0], "backend": "inductor"},
        }
        workflow["sampler"]["inputs"]["model"] = ["compiled", 0]
        return workflow

    with pytest.raises(WorkflowFailed, match="cannot do this"):
        scene.server.run(compiled(REMOTE))
    saving = workflows.text_to_image(REMOTE, replace(QUICK, seed=42), picture=False)
    saving["save_model"] = {
        "class_type": "ModelSave",
        "inputs": {"model": ["model", 0], "filename_prefix": "weightless"},
    }
    with pytest.raises(WorkflowFailed, match="no weights in ComfyUI"):
        scene.server.run(saving)


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_that_is_to_be_kept_or_not(scene: NodesScene, keep: bool) -> None:
    nodes = replace(REMOTE, model_inputs={**LOADER, "keep_resident": keep})
    settings = replace(QUICK, steps=1, seed=51 + keep)
    scene.server.run(workflows.text_to_image(nodes, settings, picture=False))

    def transformers(status: m.Status) -> list[m.ComponentStatus]:
        return [c for c in status.components if c.label == tiny_checkpoints.DIFFUSION_MODEL]

    assert transformers(scene.daemon.wait_for_status(lambda status: True))
    scene.server.free()
    scene.daemon.wait_for_status(
        lambda status: (
            len(transformers(status)) == keep and not any(c.sessions for c in transformers(status))
        ),
        30,
    )


def test_status_node(scene: NodesScene) -> None:
    entry = scene.server.run({"status": {"class_type": "XDiTStatus", "inputs": {}}})
    (text,) = entry["outputs"]["status"]["text"]
    assert "2 ranks, ready" in text
    assert tiny_checkpoints.DIFFUSION_MODEL in text


def test_every_input_is_explained(scene: NodesScene) -> None:
    info = scene.server.object_info()
    ours = {name: node for name, node in info.items() if name.startswith("XDiT")}
    assert len(ours) == 10
    for name, node in ours.items():
        assert node["category"] == "xDiT"
        assert node["description"], name
        for kind in ("required", "optional"):
            for key, spec in node["input"].get(kind, {}).items():
                assert spec[1].get("tooltip"), f"{name}: {key}"
