"""XDiT Share: objects that stock loaders made, and all who use them, on one shared copy."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import QUICK, SHARED, NodesScene, behind_share, running_nodes, text_lora
from comfyui.server import WorkflowFailed
from comfyui.workflows import STOCK, Settings, Workflow

pytestmark = pytest.mark.timeout(240)

NAMES = ("coded", "coded-latent", "coded-latent-image")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodesScene]:
    # Offloading moves weights here: see shim/memory.py.
    environment = {"TEST_SHIM_VRAM": "NORMAL_VRAM"}
    directory = tmp_path_factory.mktemp("share") / "scene"
    with running_nodes(directory, 0, environment=environment) as running:
        yield running


def coded(scene: NodesScene, workflow: Workflow) -> list[torch.Tensor]:
    """The conditioning, the latent and the picture of `workflows.coding`."""
    scene.server.run(workflow)
    return [tensor for name in NAMES for tensor in scene.server.tensors(name).values()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def coding(nodes: workflows.Nodes, settings: Settings) -> Workflow:
    return workflows.coding(nodes, settings, save="coded")


def private_bytes(scene: NodesScene, workflow: Workflow, load: bool) -> tuple[int, int]:
    """(bytes of the parameters of VAE and CLIP outside of regions, all)."""
    report = workflow | workflows.report(STOCK, load=load)
    del report["report"]["inputs"]["model"]
    asked = {"report": behind_share(report)["report"]}
    found = scene.server.run(workflow | asked)["outputs"]["report"]["parameters"]
    tensors = [each for each in found if each["parameter"]]
    private = [each for each in tensors if "xdit-sidecar" not in each["mapped"]]
    return sum(e["nbytes"] for e in private), sum(e["nbytes"] for e in tensors)


def components(scene: NodesScene) -> list[tuple[str, str]]:
    status = scene.daemon.wait_for_status(lambda _: True)
    return sorted((c.role, c.fingerprint) for c in status.components)


def test_stock_objects_are_shared(scene: NodesScene) -> None:
    settings = replace(QUICK, prompt="share")
    expected = coded(scene, coding(STOCK, settings))
    workflow = behind_share(coding(STOCK, settings))
    assert same(coded(scene, workflow), expected)
    resident = components(scene)
    assert [role for role, _ in resident] == ["clip_l", "t5", "vae"]
    # The loaders' own objects are on the same copy: nothing else is left of them in this process.
    for free in (False, True):
        private, total = private_bytes(scene, workflow, load=free)
        assert private < total // 100
        scene.server.free(free_memory=False)
        assert private_bytes(scene, workflow, load=False)[0] < total // 100
        assert same(coded(scene, workflow), expected)
    scene.server.free()
    assert same(coded(scene, workflow), expected)
    assert components(scene) == resident
    assert "are shared again" not in scene.server.log


def test_what_is_shared_already_stays_as_it_is(scene: NodesScene) -> None:
    settings = replace(QUICK, prompt="shared already")
    expected = coded(scene, coding(SHARED, settings))
    resident = components(scene)
    assert same(coded(scene, behind_share(coding(SHARED, settings))), expected)
    assert components(scene) == resident


def test_others_use_the_object_too(scene: NodesScene) -> None:
    """Behind the loader there is a LoRA, and hooks that write to weights, beside XDiT Share."""

    def workflow(*, shared: bool) -> Workflow:
        found = coding(STOCK, replace(QUICK, prompt="others"))
        found["lora"] = text_lora(0.7)
        found["hook"] = {
            "class_type": "CreateHookLora",
            "inputs": {
                "lora_name": tiny_checkpoints.LORA_TEXT,
                "strength_model": 0.0,
                "strength_clip": -0.6,
            },
        }
        found["hooked"] = {
            "class_type": "SetClipHooks",
            "inputs": {
                "clip": ["clip", 0],
                "apply_to_conds": False,
                "schedule_clip": False,
                "hooks": ["hook", 0],
            },
        }
        if shared:
            found = behind_share(found)
            for name in ("lora", "hooked"):
                found[name]["inputs"]["clip"] = ["clip", 0]
        for name, link in (("lora", 1), ("hooked", 0)):
            found[f"{name}_text"] = {
                "class_type": "CLIPTextEncode",
                "inputs": {"clip": [name, link], "text": f"others {name}"},
            }
            found[f"save_{name}"] = {
                "class_type": "TestSaveTensors",
                "inputs": {"name": f"of-{name}", "conditioning": [f"{name}_text", 0]},
            }
        return found

    def results(*, shared: bool) -> list[torch.Tensor]:
        found = coded(scene, workflow(shared=shared))
        for name in ("of-lora", "of-hooked"):
            found += scene.server.tensors(name).values()
        return found

    expected = results(shared=False)
    scene.server.free()
    for _ in range(3):
        assert same(results(shared=True), expected)
        scene.server.free(free_memory=False)
    private, total = private_bytes(scene, behind_share(coding(STOCK, QUICK)), load=True)
    assert private < total // 100


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_dynamic_objects_are_refused_with_the_flag(scene: NodesScene, kind: str) -> None:
    workflow = behind_share(coding(STOCK, replace(QUICK, prompt=f"dynamic {kind}")))
    inputs = {kind: [kind, 0]}
    workflow["dynamic"] = {"class_type": "TestDynamic", "inputs": inputs}
    workflow["share"]["inputs"][kind] = ["dynamic", ["vae", "clip"].index(kind)]
    with pytest.raises(WorkflowFailed, match="--disable-dynamic-vram") as failure:
        scene.server.run(workflow)
    assert failure.value.node_id == "share"
    scene.server.free()


def test_another_daemon(tmp_path: Path) -> None:
    with running_nodes(tmp_path / "scene", 0) as scene:
        settings = replace(QUICK, prompt="another daemon")
        workflow = behind_share(coding(STOCK, settings))
        expected = coded(scene, workflow)
        resident = components(scene)
        os.kill(scene.daemon.pid, signal.SIGKILL)
        assert scene.daemon.process is not None
        scene.daemon.process.wait(10)
        # What was shared goes on to work: only the nodes behind are new, so nothing is shared anew.
        scene.daemon.start()
        assert components(scene) == []
        assert same(coded(scene, workflow), expected)
        assert components(scene) == resident
        private, total = private_bytes(scene, workflow, load=True)
        assert private < total // 100
