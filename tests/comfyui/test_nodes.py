"""A stock workflow with our loaders gives the stock loaders' numbers, in a real ComfyUI."""

from __future__ import annotations

import io
from dataclasses import replace

import psutil
import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.cases import ALL_THERE, CASES, HERE, SAME, WHOLE, difference, sampler_difference
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


@pytest.mark.parametrize("name", WHOLE)
def test_our_sampler_as_well(scene: NodesScene, name: str) -> None:
    found, told = sampler_difference(scene, name)
    assert found < SAME
    assert told.startswith(ALL_THERE if WHOLE[name] else HERE)


def in_the_loader(**inputs: object) -> Nodes:
    return replace(REMOTE, model_inputs={**LOADER, **inputs})


@pytest.mark.parametrize(
    "degrees",
    [
        {"ulysses": "2"},
        {"ulysses": "1", "ring": "2"},
        {"ulysses": "1", "cfg_parallel": "2"},
    ],
    ids=["ulysses", "ring", "cfg"],
)
def test_degrees(scene: NodesScene, degrees: dict[str, str]) -> None:
    settings = replace(QUICK, width=272, height=208, cfg=2.0)
    nodes = in_the_loader(**degrees)
    assert difference(scene, workflows.text_to_image, settings, nodes) < SAME


def test_degrees_that_cannot_be(scene: NodesScene) -> None:
    nodes = in_the_loader(ulysses="4", ring="2")
    with pytest.raises(
        WorkflowFailed, match=r"ulysses4.*ring2.* needs 8 ranks, the group has 2"
    ) as failure:
        difference(scene, workflows.text_to_image, QUICK, nodes)
    assert failure.value.node_id == "sampler"


def test_dtype_is_what_the_ranks_compute_in(scene: NodesScene) -> None:
    step = replace(QUICK, steps=1)  # after more of them this model is somewhere else
    workflow = workflows.text_to_image(STOCK, step, save="stock", picture=False)
    expected = scene.latent(workflow, "stock")
    for dtype, least, most in (
        ("bf16", 1e-3, 0.05),
        ("fp16", 1e-4, 5e-3),
        ("fp32", 0.0, 1e-6),
        ("fp8_e4m3fn_fast", 1e-3, 0.15),
    ):
        nodes = in_the_loader(weight_dtype=dtype)
        workflow = workflows.text_to_image(nodes, step, save="ours", picture=False)
        found = scene.latent(workflow, "ours")
        assert least <= (found - expected).norm() / expected.norm() < most, dtype


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
        told = [e.data["text"] for e in listener.named("text") if e.data["node"] == "sampler"]
    found = scene.server.tensors("ours")["samples"]
    assert (found - expected).abs().max() < SAME
    direct = scene.server.tensors("ours-direct")["images"]
    assert (direct - scene.server.tensors("stock-image")["images"]).abs().max() < 1e-3
    assert settings.steps in progress
    whole = sampler != "dpmpp_sde"
    assert told == [ALL_THERE if whole else f"{HERE} the sampler dpmpp_sde is ComfyUI's own"]


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_our_sampler_with_the_largest_seeds(scene: NodesScene, sampler: str) -> None:
    """A mask's noise is that of the next seed, if the sampler is ddim."""
    settings = replace(QUICK, sampler=sampler, denoise=0.75, seed=2**64 - 2)
    expected = scene.latent(workflows.masked(STOCK, settings, save="stock", picture=False), "stock")
    ours = sampling(workflows.masked(REMOTE, settings, save="ours", picture=False))
    assert (scene.latent(ours, "ours") - expected).abs().max() < SAME


def test_our_sampler_shares_a_clip(scene: NodesScene) -> None:
    settings = replace(QUICK, seed=12)
    expected = scene.latent(workflows.text_to_image(STOCK, settings, save="stock"), "stock")
    scene.server.free()
    nodes = replace(REMOTE, clip_inputs={**STOCK.clip_inputs})
    ours = sampling(workflows.text_to_image(nodes, settings, save="ours"))
    ours["sampler"]["inputs"]["clip"] = ["clip", 0]
    assert (scene.latent(ours, "ours") - expected).abs().max() < SAME
    status = scene.daemon.wait_for_status(lambda status: True)
    shared = {c.role for c in status.components if c.sessions}
    assert {"clip_l", "t5"} <= shared


def test_our_sampler_without_a_negative_prompt(scene: NodesScene) -> None:
    """As with the stock one, that is an empty list, and ComfyUI knows what it means."""

    def without(nodes: Nodes, save: str) -> Workflow:
        settings = replace(QUICK, cfg=2.0, seed=13)
        workflow = workflows.text_to_image(nodes, settings, save=save, picture=False)
        workflow["nothing"] = {"class_type": "TestNoConditioning", "inputs": {}}
        workflow["sampler"]["inputs"]["negative"] = ["nothing", 0]
        return workflow

    expected = scene.latent(without(STOCK, "stock"), "stock")
    found = scene.latent(sampling(without(REMOTE, "ours")), "ours")
    assert (found - expected).abs().max() < SAME


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


@pytest.mark.parametrize("whole", [False, True])
def test_interrupt_and_what_comes_after(scene: NodesScene, whole: bool) -> None:
    workflow = workflows.text_to_image(REMOTE, replace(QUICK, steps=2000, seed=31), picture=False)
    with scene.server.listen() as listener:
        prompt = scene.server.queue(sampling(workflow) if whole else workflow, listener.client_id)
        listener.wait_for(lambda e: e.name == "progress" and e.data["node"] == "sampler")
        scene.server.interrupt()
        with pytest.raises(WorkflowInterrupted, match="XDiTKSampler" if whole else "KSampler"):
            scene.server.wait(prompt)
    assert difference(scene, workflows.text_to_image, replace(QUICK, seed=32), REMOTE) < SAME


def test_previews_and_progress_as_with_the_stock_sampler(scene: NodesScene) -> None:
    settings = replace(QUICK, seed=33)
    stock, ours, shared = (
        workflows.text_to_image(nodes, settings, picture=nodes is SHARED)
        for nodes in (STOCK, REMOTE, SHARED)
    )
    seen = []
    for workflow in (stock, ours, sampling(ours), sampling(shared, vae=True)):
        with scene.server.listen() as listener:
            scene.server.run(workflow, listener)
            events = [e for e in listener.events if e.name in ("progress", "preview")]
        of_sampler = [e for e in events if "sampler" in (e.data.get("node"), e.data.get("node_id"))]
        seen.append([(e.name, e.data.get("value"), picture_size(e.image)) for e in of_sampler])
    assert [name for name, _, _ in seen[0]].count("preview") == QUICK.steps
    assert all(found == seen[0] for found in seen[1:])


def picture_size(image: bytes) -> tuple[int, int] | None:
    return Image.open(io.BytesIO(image)).size if image else None


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


def test_loras_are_let_go_of(scene: NodesScene) -> None:
    """As soon as ComfyUI keeps no model with them, though it keeps the model without."""
    for strength in (0.3, 0.4):
        settings = replace(QUICK, steps=1, seed=54, loras=[(tiny_checkpoints.LORA, strength)])
        scene.server.run(workflows.text_to_image(REMOTE, settings, picture=False))

    def held(status: m.Status) -> int:
        return len([c for c in status.components if c.role == "lora" and c.sessions])

    scene.daemon.wait_for_status(lambda status: held(status) == 1, 30)
    settings = replace(QUICK, steps=1, seed=55)
    scene.server.run(workflows.text_to_image(REMOTE, settings, picture=False))
    scene.daemon.wait_for_status(lambda status: held(status) == 0, 30)


def test_status_node(scene: NodesScene) -> None:
    settings = replace(QUICK, steps=1, seed=53)
    scene.server.run(workflows.text_to_image(REMOTE, settings, picture=False))
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
