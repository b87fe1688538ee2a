"""Loaders that share, and XDiT Share: what comes out, what is refused, and one copy of all."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import (
    CHECKPOINT,
    QUICK,
    SHARED,
    NodesScene,
    behind_share,
    running_nodes,
    text_lora,
)
from comfyui.server import WorkflowFailed
from comfyui.workflows import STOCK, WHOLE_CHECKPOINT, Settings, Workflow
from ranks.components import component_files
from safetensors.torch import load_file, save_file
from xdit_sidecar.protocol.health.units import human_bytes

pytestmark = pytest.mark.timeout(240)

NAMES = ("coded", "coded-latent", "coded-latent-image")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodesScene]:
    # Offloading moves weights here: see shim/memory.py.
    environment = {"TEST_SHIM_VRAM": "NORMAL_VRAM"}
    directory = tmp_path_factory.mktemp("share") / "scene"
    with running_nodes(directory, 1, environment=environment) as running:
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


def forget_all(scene: NodesScene) -> None:
    """Nothing is resident, whatever was shared before."""
    scene.server.free()
    status = scene.daemon.wait_for_status(
        lambda status: not any(component.sessions for component in status.components), 30
    )
    with scene.daemon.client("forgetful") as client:
        for component in status.components:
            client.evict(component.fingerprint, component.device)


def test_stock_objects_are_shared(scene: NodesScene) -> None:
    forget_all(scene)
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


def test_what_files_have_made_resident_is_found(scene: NodesScene) -> None:
    """Under another fingerprint, and not for a VAE with one other number."""
    forget_all(scene)
    settings = replace(QUICK, prompt="found")
    expected = coded(scene, coding(SHARED, settings))
    resident = components(scene)
    assert same(coded(scene, behind_share(coding(STOCK, settings))), expected)
    assert components(scene) == resident
    private, total = private_bytes(scene, behind_share(coding(STOCK, settings)), load=True)
    assert private < total // 100
    vaes = scene.server.base / "models" / "vae"
    weights = load_file(vaes / tiny_checkpoints.AUTOENCODER)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, vaes / "almost.safetensors")
    other = replace(STOCK, vae_inputs={"vae_name": "almost.safetensors"})
    coded(scene, behind_share(coding(other, settings)))
    assert len(components(scene)) == len(resident) + 1


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_dynamic_objects_are_refused_with_the_flag(scene: NodesScene, kind: str) -> None:
    workflow = behind_share(coding(STOCK, replace(QUICK, prompt=f"dynamic {kind}")))
    inputs = {kind: [kind, 0]}
    workflow["dynamic"] = {"class_type": "TestDynamic", "inputs": inputs}
    workflow["share"]["inputs"][kind] = ["dynamic", ["vae", "clip"].index(kind)]
    with pytest.raises(WorkflowFailed, match="--disable-dynamic-vram") as failure:
        scene.server.run(workflow)
    assert failure.value.node_id == "share"
    # Or the object stays as it is, and that is told.
    workflow["share"]["inputs"]["on_problem"] = "load in ComfyUI"
    known = len(scene.server.log)
    coded(scene, workflow)
    assert re.search("in this ComfyUI alone: .*--disable-dynamic-vram", scene.server.log[known:])
    scene.server.free()


def test_status_tells_what_is_where_and_whose(scene: NodesScene) -> None:
    workflow = coding(SHARED, replace(QUICK, prompt="status"))
    coded(scene, workflow)
    # Together: ComfyUI drops what is not in the workflow.
    workflow["status"] = {"class_type": "XDiTStatus", "inputs": {}}
    entry = scene.server.run(workflow)
    (text,) = entry["outputs"]["status"]["text"]
    status = scene.daemon.wait_for_status(lambda _: True)
    (here,) = [s for s in status.sessions if s.pid == scene.server.pid]
    assert here.hello.host is not None
    assert here.hello.host.startswith("ComfyUI ")
    models = scene.server.base / "models"
    for role, path in {
        "vae": models / "vae" / tiny_checkpoints.AUTOENCODER,
        "clip_l": models / "text_encoders" / tiny_checkpoints.CLIP_L,
        "t5": models / "text_encoders" / tiny_checkpoints.T5XXL,
    }.items():
        (component,) = [
            c
            for c in status.components
            if (c.role, c.label) == (role, path.name) and here.session in c.sessions
        ]
        assert component.nbytes >= path.stat().st_size * 0.99
        assert (
            f"{role}: {path.name} on cpu, {human_bytes(component.nbytes)}, resident, "
            f"used by {here.hello.host}"
        ) in text.splitlines()
    assert re.search(r"^cpu: \w+, .* of components, .* free$", text, re.MULTILINE)


# --- loaders


@pytest.mark.parametrize("device", ["default", "cpu"])
@pytest.mark.parametrize("file", [tiny_checkpoints.CLIP_L, tiny_checkpoints.T5XXL])
def test_one_text_encoder(scene: NodesScene, file: str, device: str) -> None:
    """Load CLIP (xDiT) gives what Load CLIP gives, from wherever the weights are."""
    inputs = {"clip_name": file, "device": device}
    settings = replace(QUICK, prompt=f"{file} {device}")
    stock = replace(STOCK, clip="CLIPLoader", clip_inputs={**inputs, "type": "stable_diffusion"})
    ours = replace(STOCK, clip="XDiTLoadCLIP", clip_inputs=inputs)
    expected = conditioning(scene, stock, settings)
    assert equal(conditioning(scene, ours, settings), expected)
    assert_shared(scene, ours, "clip")


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_both_text_encoders(scene: NodesScene, device: str) -> None:
    settings = replace(QUICK, prompt=f"both {device}")
    given = {"device": device}
    stock = replace(STOCK, clip_inputs={**STOCK.clip_inputs, **given})
    ours = replace(SHARED, clip_inputs={**SHARED.clip_inputs, **given})
    expected = conditioning(scene, stock, settings)
    assert equal(conditioning(scene, ours, settings), expected)
    assert_shared(scene, ours, "clip")


@pytest.mark.parametrize("rest", ["float32", "bfloat16"])
def test_scaled_fp8(scene: NodesScene, rest: str) -> None:
    """Each tensor is converted to what ComfyUI has it in, however many dtypes these are."""
    folder = scene.server.base / "models" / "text_encoders"
    weights = {
        name: tensor.float() for name, tensor in load_file(folder / tiny_checkpoints.T5XXL).items()
    }
    stored = {
        name: tensor.to(getattr(torch, rest)) if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in component_files.store(weights, "", scaled=True).items()
    }
    save_file(stored, folder / f"scaled-{rest}.safetensors")
    given = {"clip_name2": f"scaled-{rest}.safetensors"}
    settings = replace(QUICK, prompt=f"scaled {rest}")
    stock = replace(STOCK, clip_inputs={**STOCK.clip_inputs, **given})
    ours = replace(SHARED, clip_inputs={**SHARED.clip_inputs, **given})
    expected = conditioning(scene, stock, settings)
    assert equal(conditioning(scene, ours, settings), expected)
    assert_shared(scene, ours, "clip")


def conditioning(
    scene: NodesScene, nodes: workflows.Nodes, settings: Settings
) -> dict[str, torch.Tensor]:
    scene.server.run(workflows.encode_only(nodes, settings, save="encoded"))
    return scene.server.tensors("encoded")


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def assert_shared(scene: NodesScene, nodes: workflows.Nodes, part: str) -> None:
    """All big parameters are in regions, on the CPU, and stay there."""
    report = workflows.report(nodes)
    for other in {"model", "clip", "vae"} - {part}:
        del report["report"]["inputs"][other]
    found = scene.server.run(report)["outputs"]["report"]["parameters"]
    tensors = [each for each in found if each["parameter"] and len(each["shape"]) > 1]
    assert len(tensors) > 10
    own = [each["name"] for each in tensors if "xdit-sidecar" not in each["mapped"]]
    assert [name for name in own if not name.endswith("text_projection.weight")] == []
    assert {each["offload_device"] for each in tensors} == {"cpu"}


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE by diffusers' names and shapes, as far as ComfyUI looks at them."""

    def rename(found: re.Match[str]) -> str:
        return f".up_blocks.{3 - int(found[1])}.resnets."

    return {
        re.sub(r"\.up\.(\d)\.block\.", rename, name): (
            tensor.flatten(1) if ".attn_1." in name and tensor.ndim == 4 else tensor
        )
        for name, tensor in weights.items()
    }


def bigger(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "decoder.mid.block_1.conv1.weight"
    return {**weights, name: torch.cat([weights[name]] * 2)}


def shorter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in weights.items() if "decoder.norm_out" not in name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed, r"diffusers' layout.*put XDiT Share behind it"),
        (bigger, r"size mismatch for decoder\.mid\.block_1\.conv1\.weight"),
        (shorter, r"lacks decoder\.norm_out\.\w+: it is incomplete"),
    ],
)
def test_nothing_of_an_unsuitable_vae_is_handed_over(
    scene: NodesScene, change: Callable[[dict[str, torch.Tensor]], Any], told: str
) -> None:
    vaes = scene.server.base / "models" / "vae"
    name = f"{change.__name__}.safetensors"
    save_file(change(load_file(vaes / tiny_checkpoints.AUTOENCODER)), vaes / name)
    nodes = replace(SHARED, vae_inputs={"vae_name": name})
    before = components(scene)
    with pytest.raises(WorkflowFailed, match=told) as failure:
        scene.server.run(coding(nodes, replace(QUICK, prompt=name)))
    assert failure.value.node_id == "vae"
    added = set(components(scene)) - set(before)
    assert not [role for role, _ in added if role == "vae"]


# --- Load Checkpoint (xDiT)


def checkpoint(seed: int, node: dict[str, Any] | None = None, **inputs: Any) -> Workflow:
    """A run with the model of our loader, perhaps through another ``node``."""
    nodes = replace(CHECKPOINT, checkpoint_inputs={**CHECKPOINT.checkpoint_inputs, **inputs})
    return through(workflows.text_to_image(nodes, run_of(seed), save="ours", picture=False), node)


def run_of(seed: int) -> Settings:
    return replace(QUICK, steps=4, seed=seed)


def through(workflow: Workflow, node: dict[str, Any] | None) -> Workflow:
    if node is not None:
        inputs = {**node["inputs"], "model": ["checkpoint", 0]}
        workflow["between"] = {**node, "inputs": inputs}
        workflow["sampler"]["inputs"]["model"] = ["between", 0]
    return workflow


# Patches blocks in the last third of the run, and until then nothing.
LATE = {
    "class_type": "SkipLayerGuidanceDiT",
    "inputs": {
        "double_layers": "0",
        "single_layers": "1",
        "scale": 3.0,
        "start_percent": 0.7,
        "end_percent": 1.0,
        "rescaling_scale": 0.0,
    },
}
COMPILED = {"class_type": "TorchCompileModel", "inputs": {"backend": "inductor"}}


@pytest.mark.parametrize("node", [LATE, COMPILED], ids=["late", "compiled"])
def test_a_checkpoint_is_looked_at_before_it_is_sampled(
    scene: NodesScene, node: dict[str, Any]
) -> None:
    with scene.server.listen() as listener:
        with pytest.raises(WorkflowFailed, match="cannot do this"):
            scene.server.run(checkpoint(90, node), listener)
        assert not [e for e in listener.named("progress") if e.data["node"] == "sampler"]


@pytest.mark.parametrize(
    ("node", "said"),
    [(LATE, "samples in ComfyUI, because"), (COMPILED, "samples in ComfyUI, uncompiled, because")],
    ids=["late", "compiled"],
)
def test_a_checkpoint_is_sampled_here_where_that_is_set(
    scene: NodesScene, node: dict[str, Any], said: str
) -> None:
    workflow = workflows.text_to_image(WHOLE_CHECKPOINT, run_of(91), save="stock", picture=False)
    stock = workflow if node is COMPILED else through(workflow, node)
    expected = scene.latent(stock, "stock")
    with scene.server.listen() as listener:
        scene.server.run(checkpoint(91, node, on_problem="sample locally"), listener)
        (told,) = {e.data["node"]: e.data["text"] for e in listener.named("text")}.items()
    assert told[0] == "checkpoint"
    assert said in told[1]
    assert torch.equal(scene.server.tensors("ours")["samples"], expected)


def test_errors_name_the_checkpoint_loader(scene: NodesScene) -> None:
    workflow = checkpoint(92)
    workflow["save_model"] = {
        "class_type": "ModelSave",
        "inputs": {"model": ["checkpoint", 0], "filename_prefix": "weightless"},
    }
    told = r"model of the 'Load Checkpoint \(xDiT\)' node has no weights"
    with pytest.raises(WorkflowFailed, match=told):
        scene.server.run(workflow)


def test_the_choices_of_a_checkpoint_are_kept(scene: NodesScene) -> None:
    with pytest.raises(WorkflowFailed, match="ranks"):
        scene.server.run(checkpoint(93, ulysses="2"))  # there is one
    plain = scene.latent(checkpoint(94), "ours")
    rounded = scene.latent(checkpoint(94, weight_dtype="bf16"), "ours")
    assert 0 < (plain - rounded).abs().max() < 1
    forget_all(scene)
    scene.server.run(checkpoint(95, keep_resident=False))
    scene.server.free()
    scene.daemon.wait_for_status(
        lambda status: "transformer" not in {c.role for c in status.components}, 30
    )


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
