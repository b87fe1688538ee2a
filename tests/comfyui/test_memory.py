"""ComfyUI's memory management never un-shares: it unloads, offloads and switches, weights stay.

On the CPU ComfyUI has nothing to unload to, so the test shim has it treat host memory like a GPU's:
see shim/memory.py. A test of stock loaders shows that there weights do move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import CHECKPOINT, QUICK, SHARED, NodesScene, comfy_of, text_lora
from comfyui.server import ComfyServer
from comfyui.workflows import STOCK, WHOLE_CHECKPOINT, Nodes, Settings, Workflow
from daemon_process import DaemonProcess
from ranks_scene import running_ranks

pytestmark = pytest.mark.timeout(240)

Tensors = dict[str, torch.Tensor]
PROMPTS = {"NORMAL_VRAM": 20, "LOW_VRAM": 4, "NO_VRAM": 4}
# ComfyUI's own, of a few bytes, and what the tiny CLIP-L has none of: no file has them.
OF_NO_FILE = ("logit_scale", "text_projection.weight")
SHARED_AGAIN = "are shared again"


@pytest.fixture(scope="module")
def one_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """For all of these ComfyUIs, one after the other."""
    with running_ranks(tmp_path_factory.mktemp("memory") / "daemon", 1) as running:
        yield running.daemon


@pytest.fixture(scope="module", params=["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM"])
def scene(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_daemon: DaemonProcess,
) -> Iterator[NodesScene]:
    """A ComfyUI that believes to be short of memory all the time."""
    with comfy_of(
        one_daemon,
        tmp_path_factory.mktemp("memory") / "base",
        arguments=["--reserve-vram", "1000"],  # GB
        environment={"TEST_SHIM_VRAM": request.param},
    ) as server:
        yield NodesScene(one_daemon, server)


def parameters(scene: NodesScene, workflow: Workflow) -> dict[str, dict[str, Any]]:
    """What the workflow's report says of the parameters of VAE and CLIP, by name."""
    found = scene.server.run(workflow)["outputs"]["report"]["parameters"]
    return {
        f"{each['of']}.{each['name']}": each
        for each in found
        if each["parameter"] and each["of"] != "model"
    }


def report_of(nodes: Nodes, *, load: bool = False) -> Workflow:
    """Where the parameters lie; with ``load``, once ComfyUI has loaded them all."""
    workflow = workflows.report(nodes, load=load)
    del workflow["report"]["inputs"]["model"]
    return workflow


def astray(scene: NodesScene, workflow: Workflow) -> list[str]:
    """The parameters that have a file and do not lie in a region."""
    found = parameters(scene, workflow)
    assert len(found) > 100
    return [
        name
        for name, each in found.items()
        if "xdit-sidecar" not in each["mapped"] and not name.endswith(OF_NO_FILE)
    ]


def coded(scene: NodesScene, nodes: Nodes, settings: Settings) -> list[torch.Tensor]:
    """The conditioning, the latent and the picture."""
    scene.server.run(workflows.coding(nodes, settings, save="coded"))
    names = ("coded", "coded-latent", "coded-latent-image")
    return [tensor for name in names for tensor in scene.server.tensors(name).values()]


def assert_as_stock(
    scene: NodesScene, settings: Settings, nodes: Nodes = SHARED, stock: Nodes = STOCK
) -> None:
    """The same bits as from stock loaders."""
    found, expected = coded(scene, nodes, settings), coded(scene, stock, settings)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_here_stock_weights_move(scene: NodesScene) -> None:
    coded(scene, STOCK, replace(QUICK, prompt="moving"))
    before = parameters(scene, report_of(STOCK, load=True))
    scene.server.free(free_memory=False)
    after = parameters(scene, report_of(STOCK))
    moved = [name for name in before if before[name]["data_ptr"] != after[name]["data_ptr"]]
    assert len(moved) > len(before) * 0.9
    assert astray(scene, report_of(STOCK))


def test_shared_weights_do_not(scene: NodesScene, request: pytest.FixtureRequest) -> None:
    known = len(scene.server.log)
    for number in range(PROMPTS[request.node.callspec.params["scene"]]):
        coded(scene, SHARED, replace(QUICK, prompt=f"prompt {number}"))
        assert not astray(scene, report_of(SHARED))
    first = parameters(scene, report_of(SHARED))
    for free_memory in (False, True):
        scene.server.free(free_memory=free_memory)
        assert not astray(scene, report_of(SHARED))
        assert_as_stock(scene, replace(QUICK, prompt=f"freed {free_memory}"))
        assert not astray(scene, report_of(SHARED))
    assert {e["mapped"] for e in first.values()} >= {"/memfd:xdit-sidecar (deleted)"}
    # Not even for a moment.
    assert SHARED_AGAIN not in scene.server.log[known:]


def test_another_checkpoint(scene: NodesScene) -> None:
    other = {"ckpt_name": tiny_checkpoints.CHECKPOINT_OTHER}
    settings = replace(QUICK, prompt="switching")
    for inputs in ({}, {"checkpoint_inputs": other}, {}):
        ours, stock = (replace(nodes, **inputs) for nodes in (CHECKPOINT, WHOLE_CHECKPOINT))
        assert_as_stock(scene, settings, ours, stock)
        assert not astray(scene, report_of(ours))


def test_leases_end_with_the_models(scene: NodesScene) -> None:
    coded(scene, CHECKPOINT, replace(QUICK, prompt="leased"))

    def leased(status: Any) -> list[str]:
        ours = {s.session for s in status.sessions if s.pid == scene.server.pid}
        return [c.role for c in status.components if ours & set(c.sessions)]

    scene.daemon.wait_for_status(lambda status: {"vae", "clip_l", "t5"} <= set(leased(status)))
    scene.server.free()
    scene.daemon.wait_for_status(lambda status: not leased(status), 30)


# --- patched text encoders


def with_lora(nodes: Nodes, prompt: str, save: str, strength: float = 0.7) -> Workflow:
    """Text encoded by encoders that a LoRA changed."""
    workflow = workflows.encode_only(nodes, replace(QUICK, prompt=prompt), save=save)
    workflow["lora"] = text_lora(strength)
    workflow["positive"]["inputs"]["clip"] = ["lora", 1]
    return workflow


def with_hooks(nodes: Nodes, prompt: str, save: str, *, scheduled: bool, lora: bool) -> Workflow:
    """Text encoded by encoders that hooks change: for good, or more and more during the run."""
    workflow = with_lora(nodes, prompt, save)
    workflow["early"] = {
        "class_type": "CreateHookKeyframe",
        "inputs": {"strength_mult": 0.4, "start_percent": 0.0},
    }
    workflow["late"] = {
        "class_type": "CreateHookKeyframe",
        "inputs": {"strength_mult": 1.3, "start_percent": 0.5, "prev_hook_kf": ["early", 0]},
    }
    workflow["hook"] = {
        "class_type": "CreateHookLora",
        "inputs": {
            "lora_name": tiny_checkpoints.LORA_TEXT,
            "strength_model": 0.0,
            "strength_clip": -0.6,
        },
    }
    workflow["frames"] = {
        "class_type": "SetHookKeyframes",
        "inputs": {"hooks": ["hook", 0], "hook_kf": ["late", 0]},
    }
    workflow["hooked"] = {
        "class_type": "SetClipHooks",
        "inputs": {
            "clip": ["lora", 1] if lora else ["clip", 0],
            "apply_to_conds": False,
            "schedule_clip": scheduled,
            "hooks": ["frames", 0],
        },
    }
    workflow["positive"]["inputs"]["clip"] = ["hooked", 0]
    return workflow


def checksums(scene: NodesScene) -> dict[str, list[int]]:
    """Sums over the bytes of every resident component, as another client sees them."""
    sums = {}
    with scene.daemon.client("checker") as client:
        for component in client.status().components:
            with client.attach(component.fingerprint, component.device) as attachment:
                views = attachment.tensors().values()
                # Bytes as int32 where they fit: an order changed would not be seen, a write would.
                sums[f"{component.role} {component.fingerprint}"] = [
                    int(view.reshape(-1).view(torch.uint8).long().sum()) for view in views
                ]
            del attachment, views
    return sums


PATCHED = {
    "LoRA": lambda nodes, save: with_lora(nodes, "patched", save),
    "another strength": lambda nodes, save: with_lora(nodes, "patched", save, -0.4),
    "hooks": lambda nodes, save: with_hooks(nodes, "hooked", save, scheduled=False, lora=False),
    "scheduled": lambda nodes, save: with_hooks(nodes, "hooked", save, scheduled=True, lora=False),
    "both": lambda nodes, save: with_hooks(nodes, "hooked", save, scheduled=True, lora=True),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """What stock loaders give where memory is plenty; "plain" is without patches.

    Short of memory ComfyUI does not round patched weights, and so gives other numbers.
    """
    with ComfyServer(tmp_path_factory.mktemp("plenty") / "base") as server:
        plain = encoded(server, workflows.encode_only(STOCK, QUICK, save="patched"))
        return {"plain": plain} | {
            name: encoded(server, build(STOCK, "patched")) for name, build in PATCHED.items()
        }


@pytest.mark.parametrize("name", PATCHED)
def test_patches_are_private(scene: NodesScene, expected: dict[str, Tensors], name: str) -> None:
    coded(scene, SHARED, replace(QUICK, prompt="before"))
    before = checksums(scene)
    assert not equal(expected[name], expected["plain"])  # the patches have an effect
    for _ in range(2):
        assert equal(encoded(scene.server, PATCHED[name](SHARED, "patched")), expected[name])
        plain = workflows.encode_only(SHARED, QUICK, save="patched")
        assert equal(encoded(scene.server, plain), expected["plain"])
        assert not astray(scene, report_of(SHARED))
        scene.server.free()
    now = checksums(scene)
    assert {name: now[name] for name in before} == before


def encoded(server: ComfyServer, workflow: Workflow) -> Tensors:
    """What the workflow saved as "patched"."""
    server.run(workflow)
    return server.tensors("patched")


def equal(found: Tensors, expected: Tensors) -> bool:
    """To the bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )
