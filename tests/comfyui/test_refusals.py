"""What the ranks cannot do is told before it is sampled, or ComfyUI does it and says so."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.cases import ALL_THERE, HERE
from comfyui.listener import Event
from comfyui.nodes_scene import (
    LOCAL,
    QUICK,
    REMOTE,
    NodesScene,
    running_nodes,
    sampling,
)
from comfyui.server import WorkflowFailed, WorkflowInterrupted
from comfyui.workflows import STOCK, Nodes, Workflow
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.timeout(240)

GUARD = 10  # times what is promised: the machine may be busy


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodesScene]:
    others = {"extra_pack": Path(__file__).with_name("extra_pack")}
    with running_nodes(tmp_path_factory.mktemp("refusals") / "scene", 1, others=others) as running:
        yield running


def samples(event: Event) -> bool:
    """Whether a step is done. (Loaders have progress bars, too.)"""
    return event.name == "progress" and event.data["node"] == "sampler"


def base(nodes: Nodes, seed: int = 80) -> Workflow:
    settings = replace(QUICK, seed=seed, cfg=2.0)
    return workflows.text_to_image(nodes, settings, save="refused", picture=False)


def on_model(nodes: Nodes, class_type: str, **inputs: object) -> Workflow:
    """A node between the model's loader and the sampler."""
    workflow = base(nodes)
    workflow["between"] = {"class_type": class_type, "inputs": {"model": ["model", 0], **inputs}}
    workflow["sampler"]["inputs"]["model"] = ["between", 0]
    return workflow


def controlled(nodes: Nodes) -> Workflow:
    workflow = base(nodes)
    workflow["control"] = {"class_type": "TestControl", "inputs": {}}
    workflow["hint"] = {"class_type": "LoadImage", "inputs": {"image": tiny_checkpoints.PICTURE}}
    workflow["apply"] = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {
            "positive": workflow["sampler"]["inputs"]["positive"],
            "negative": workflow["sampler"]["inputs"]["negative"],
            "control_net": ["control", 0],
            "image": ["hint", 0],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
    }
    workflow["sampler"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    return workflow


def hooked(nodes: Nodes) -> Workflow:
    workflow = base(nodes)
    workflow["hook"] = {
        "class_type": "CreateHookLora",
        "inputs": {
            "lora_name": tiny_checkpoints.LORA,
            "strength_model": 0.8,
            "strength_clip": 0.0,
        },
    }
    workflow["with_hook"] = {
        "class_type": "ConditioningSetProperties",
        "inputs": {
            "cond_NEW": workflow["sampler"]["inputs"]["positive"],
            "strength": 1.0,
            "set_cond_area": "default",
            "hooks": ["hook", 0],
        },
    }
    workflow["sampler"]["inputs"]["positive"] = ["with_hook", 0]
    return workflow


def with_lora(file: str) -> Callable[[Nodes], Workflow]:
    settings = replace(QUICK, seed=80, cfg=2.0, loras=[(file, 0.8)])
    return lambda nodes: workflows.text_to_image(nodes, settings, save="refused", picture=False)


def conditioned(what: str) -> Callable[[Nodes], Workflow]:
    """A stock workflow with a reference, and more said in its conditioning."""

    def build(nodes: Nodes) -> Workflow:
        settings = replace(QUICK, seed=80)
        workflow = workflows.kontext(nodes, settings, save="refused", picture=False)
        given = workflow["sampler"]["inputs"]["positive"]
        inputs = {"conditioning": given, "what": what}
        workflow["said"] = {"class_type": "TestSetCondition", "inputs": inputs}
        workflow["sampler"]["inputs"]["positive"] = ["said", 0]
        return workflow

    return build


def laden(nodes: Nodes) -> Workflow:
    """A patch that cannot be remote, behind all else that nodes add to a model."""
    workflow = on_model(nodes, "TomePatchModel", ratio=0.3)
    what = "apply_model, predict_noise, sampler_sample, injection, callback, weight wrapper"
    workflow["more"] = {
        "class_type": "TestAddToModel",
        "inputs": {"model": ["model", 0], "what": what},
    }
    workflow["between"]["inputs"]["model"] = ["more", 0]
    return workflow


def skipping(nodes: Nodes) -> Workflow:
    return on_model(
        nodes,
        "SkipLayerGuidanceDiT",
        double_layers="0",
        single_layers="1",
        scale=3.0,
        start_percent=0.0,
        end_percent=1.0,
        rescaling_scale=0.0,
    )


#: What cannot be remote → the error, and whether stock nodes' numbers change with it.
IMPOSSIBLE: dict[str, tuple[Callable[[Nodes], Workflow], str]] = {
    "ControlNet": (controlled, "ControlNet"),
    "LoRA hooks": (hooked, "LoRA hooks in the conditioning"),
    "skipped layers": (skipping, "node SkipLayerGuidanceDiT"),
    "perturbed attention": (
        lambda nodes: on_model(nodes, "PerturbedAttentionGuidance", scale=3.0),
        "node PerturbedAttentionGuidance",
    ),
    "attention patch": (
        lambda nodes: on_model(nodes, "TomePatchModel", ratio=0.3),
        "patches of attention",
    ),
    "all kinds": (laden, "patches of attention"),
    "weight wrapper": (
        lambda nodes: on_model(nodes, "TestAddToModel", what="weight wrapper"),
        "functions that change weights",
    ),
    "compiled": (
        # In ComfyUI the same is sampled without being compiled.
        lambda nodes: (
            base(nodes)
            if nodes is STOCK
            else on_model(nodes, "TorchCompileModel", backend="inductor")
        ),
        r"compiling the diffusion model \(TorchCompileModel\)",
    ),
    "LoKr": (with_lora(tiny_checkpoints.LORA_LOKR), "another kind than LoRA .lokr"),
    "DoRA": (with_lora(tiny_checkpoints.LORA_DORA), "DoRA"),
    "method of references": (conditioned("method"), "index_timestep_zero"),
    "unknown argument": (conditioned("argument"), "the argument test_argument"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_before_sampling(scene: NodesScene, name: str) -> None:
    build, text = IMPOSSIBLE[name]
    with scene.server.listen() as listener:
        with pytest.raises(WorkflowFailed, match=f"cannot do this: .*{text}") as failure:
            scene.server.run(build(REMOTE), listener)
        assert not list(filter(samples, listener.events))
    assert failure.value.node_id == "sampler"
    assert "sample locally" in str(failure.value)  # what to do
    with pytest.raises(WorkflowFailed, match=f"cannot do this: .*{text}"):
        scene.server.run(sampling(build(REMOTE)))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sampled_locally(scene: NodesScene, name: str) -> None:
    build, text = IMPOSSIBLE[name]
    expected = scene.latent(build(STOCK), "refused")
    known = len(scene.server.log)
    with scene.server.listen() as listener:
        scene.server.run(build(LOCAL), listener)
        told = [event.data for event in listener.named("text")]
    assert torch.equal(scene.server.tensors("refused")["samples"], expected)
    how = ", uncompiled," if "TorchCompileModel" in text else ","
    assert re.search(f"samples in ComfyUI{how} because .*{text}", scene.server.log[known:])
    assert [t for t in told if t["node"] == "model" and re.search(text, t["text"])]
    # With our sampler, too.
    assert torch.equal(scene.latent(sampling(build(LOCAL)), "refused"), expected)
    # And the same model without that is remote again.
    plain = scene.latent(base(STOCK, seed=81), "refused")
    assert (scene.latent(base(LOCAL, seed=81), "refused") - plain).abs().max() < 1e-4


@pytest.mark.parametrize("patched", [False, True])
def test_guider_without_a_negative_condition(scene: NodesScene, patched: bool) -> None:
    """Remote, and sampled locally: what it has for the negative group is None."""

    def guided(nodes: Nodes) -> Workflow:
        workflow = workflows.custom(nodes, replace(QUICK, seed=85), save="refused", picture=False)
        workflow["guider"]["class_type"] = "TestPositiveGuider"
        if patched:
            inputs = {"model": ["model", 0], "ratio": 0.3}
            workflow["between"] = {"class_type": "TomePatchModel", "inputs": inputs}
            workflow["guider"]["inputs"]["model"] = ["between", 0]
        return workflow

    expected = scene.latent(guided(STOCK), "refused")
    assert (scene.latent(guided(LOCAL), "refused") - expected).abs().max() < 1e-4


#: Not refusals: what goes around the diffusion model works with one that is elsewhere.
AROUND: dict[str, Callable[[Nodes], Workflow]] = {
    "arguments": lambda nodes: on_model(nodes, "TestWrapDiffusionModel"),
    "v prediction": lambda nodes: on_model(
        nodes, "ModelSamplingDiscrete", sampling="v_prediction", zsnr=False
    ),
    "timesteps": lambda nodes: on_model(nodes, "ModelSamplingSD3", shift=3.0),
    "shift": lambda nodes: on_model(
        nodes, "ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=256, height=256
    ),
    **{
        what: partial(on_model, class_type="TestAddToModel", what=what)
        for what in (
            *("diffusion_model", "apply_model", "predict_noise", "sampler_sample"),
            *("calc_cond_batch", "outer_sample", "injection", "callback"),
        )
    },
}


@pytest.mark.parametrize("name", AROUND)
def test_around_the_model(scene: NodesScene, name: str) -> None:
    build = AROUND[name]
    plain, stock, ours = (
        scene.latent(workflow, "refused") for workflow in (base(STOCK), build(STOCK), build(REMOTE))
    )
    assert (plain - stock).abs().max() > 0.01
    assert (ours - stock).abs().max() < 1e-4
    with scene.server.listen() as listener:
        scene.server.run(sampling(build(REMOTE)), listener)
        told = [e.data["text"] for e in listener.named("text") if e.data["node"] == "sampler"]
    assert (scene.server.tensors("refused")["samples"] - stock).abs().max() < 1e-4
    whole = name == "shift"  # other noise levels, and nothing else
    assert [text.startswith(ALL_THERE if whole else HERE) for text in told] == [True]


@pytest.mark.parametrize("part", ["forward", "forward_orig", "double_blocks"])
def test_parts_cannot_be_replaced(scene: NodesScene, part: str) -> None:
    text = f"XDiT UNet Loader.*whatever sets its {part}"
    with pytest.raises(WorkflowFailed, match=text) as failure:
        scene.server.run(on_model(REMOTE, "TestReplacePart", name=part))
    assert failure.value.node_id == "between"


def test_layers_that_are_looked_for(scene: NodesScene) -> None:
    """Who takes an AttributeError for an answer does not go on without the layer."""
    with pytest.raises(WorkflowFailed, match=r"XDiT UNet Loader.*reads its double_blocks"):
        scene.server.run(on_model(REMOTE, "TestBypassLayer"))


def incomplete(scene: NodesScene) -> dict[str, object]:
    """A file that ComfyUI takes and the ranks do not."""
    models = scene.server.base / "models" / "diffusion_models"
    tensors = load_file(models / tiny_checkpoints.DIFFUSION_MODEL)
    save_file(
        {**tensors, "double_blocks.0.more.weight": torch.ones(4, 4)}, models / "more.safetensors"
    )
    return {"unet_name": "more.safetensors"}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("what", "text"), [("degrees", "ulysses4 needs 4 ranks"), ("file", "more.safetensors")]
)
def test_what_only_the_ranks_refuse(scene: NodesScene, what: str, text: str, whole: bool) -> None:
    """Told when the first step is asked for; the loader's setting counts all the same."""
    inputs = {"ulysses": "4"} if what == "degrees" else incomplete(scene)

    def build(nodes: Nodes) -> Workflow:
        workflow = base(replace(nodes, model_inputs={**nodes.model_inputs, **inputs}), seed=86)
        return sampling(workflow) if whole else workflow

    with pytest.raises(WorkflowFailed, match=text) as failure:
        scene.server.run(build(REMOTE))
    assert failure.value.node_id == "sampler"
    expected = scene.latent(base(STOCK, seed=86), "refused")
    known = len(scene.server.log)
    assert torch.equal(scene.latent(build(LOCAL), "refused"), expected)
    assert re.search(f"samples in ComfyUI, because the daemon.*{text}", scene.server.log[known:])


def readers() -> dict[str, dict[str, object]]:
    model = ["model", 0]
    return {
        "ModelSave": {"model": model, "filename_prefix": "weightless"},
        "CheckpointSave": {
            "model": model,
            "clip": ["clip", 0],
            "vae": ["vae", 0],
            "filename_prefix": "weightless",
        },
        "ModelMergeSimple": {"model1": ["other", 0], "model2": model, "ratio": 0.5},
        "ModelMergeFlux1": {"model1": model, "model2": ["other", 0]},
    }


@pytest.mark.parametrize("name", readers())
def test_readers_of_weights(scene: NodesScene, name: str) -> None:
    workflow = base(REMOTE, seed=82)
    workflow["other"] = {
        "class_type": "UNETLoader",
        "inputs": {
            "unet_name": tiny_checkpoints.DIFFUSION_MODEL_OTHER,
            "weight_dtype": "default",
        },
    }
    inputs = dict(readers()[name])
    spec = scene.server.object_info(name)
    for key, (kind, *rest) in spec["input"]["required"].items():
        if key not in inputs:
            assert kind == "FLOAT", key
            inputs[key] = rest[0]["default"]
    workflow["reader"] = {"class_type": name, "inputs": inputs}
    if spec["output"]:
        workflow["sampler"]["inputs"]["model"] = ["reader", 0]
    with pytest.raises(WorkflowFailed) as failure:
        scene.server.run(workflow)
    if name == "ModelMergeFlux1":  # patches the remote model with the other one's weights
        assert re.search(r"cannot do this: .* merged .*\(ModelMerge nodes\)", str(failure.value))
        assert failure.value.node_id == "sampler"
    else:
        assert "the model of the 'XDiT UNet Loader' node has no weights" in str(failure.value)
        assert failure.value.node_id == "reader"


@pytest.mark.parametrize("whole", [False, True])
def test_interrupt_is_quick(
    scene: NodesScene, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    released = sorted(interrupted_after(scene, seed, whole) for seed in range(90, 95))
    with capsys.disabled():
        times = ", ".join(f"{seconds * 1000:.0f}" for seconds in released)
        print(f"\ninterrupt: the prompt was released after {times} ms")
    assert released[2] < 0.1 * GUARD
    expected = scene.latent(base(STOCK, seed=84), "refused")
    assert (scene.latent(base(REMOTE, seed=84), "refused") - expected).abs().max() < 1e-4


def interrupted_after(scene: NodesScene, seed: int, whole: bool) -> float:
    """Seconds from the press of the button to the end of the prompt."""
    settings = replace(QUICK, steps=2000, seed=seed)
    workflow = workflows.text_to_image(REMOTE, settings, picture=False)
    if whole:
        workflow = sampling(workflow)
    with scene.server.listen() as listener:
        prompt = scene.server.queue(workflow, listener.client_id)
        listener.wait_for(samples)
        pressed = time.monotonic()
        scene.server.interrupt()
        released = listener.wait_until_done(prompt).at - pressed
        with pytest.raises(WorkflowInterrupted):
            scene.server.wait(prompt)
    return released
