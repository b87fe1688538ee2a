"""What the ranks cannot do is told before it is sampled, or ComfyUI does it and says so."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui import packs, tiny_checkpoints, workflows
from comfyui.listener import Event
from comfyui.nodes_scene import LOCAL, QUICK, REMOTE, SHARED, NodesScene, running_nodes
from comfyui.server import ComfyServer, WorkflowFailed, WorkflowInterrupted
from comfyui.workflows import STOCK, Nodes, Workflow
from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.endpoints import Endpoints
from xdit_sidecar.protocol.version import (
    PROTOCOL_VERSION,
    ProtocolVersion,
    encode_preamble,
    explain_mismatch,
)

pytestmark = pytest.mark.timeout(240)

OTHERS = [PROTOCOL_VERSION._replace(major=major) for major in (0, 9)]
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


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sampled_locally(scene: NodesScene, name: str) -> None:
    build, text = IMPOSSIBLE[name]
    expected = scene.latent(build(STOCK), "refused")
    known = len(scene.server.log)
    with scene.server.listen() as listener:
        scene.server.run(build(LOCAL), listener)
        told = [event.data for event in listener.named("text")]
    assert torch.equal(scene.server.tensors("refused")["samples"], expected)
    assert re.search(f"samples in ComfyUI, because .*{text}", scene.server.log[known:])
    assert [t for t in told if t["node"] == "model" and re.search(text, t["text"])]
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


def test_wrappers_are_called(scene: NodesScene) -> None:
    """Not a refusal: what goes around the diffusion model works with one that is elsewhere."""
    latents = [
        scene.latent(build, "refused")
        for build in (
            base(STOCK),
            on_model(STOCK, "TestWrapDiffusionModel"),
            on_model(REMOTE, "TestWrapDiffusionModel"),
        )
    ]
    assert (latents[0] - latents[1]).abs().max() > 0.01
    assert (latents[1] - latents[2]).abs().max() < 1e-4


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
        "TorchCompileModel": {"model": model, "backend": "inductor"},
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
    with pytest.raises(WorkflowFailed, match=r"(XDiT UNet Loader|cannot do this)"):
        scene.server.run(workflow)


@contextlib.contextmanager
def speaking(version: ProtocolVersion) -> Iterator[Path]:
    """The runtime directory of what greets and refuses as a daemon of another version does."""
    reason = explain_mismatch(version, PROTOCOL_VERSION)
    assert reason is not None
    refusal = codec.encode(m.Refused("version", reason))
    greeting = encode_preamble(version) + len(refusal).to_bytes(4, "big") + refusal
    with (
        tempfile.TemporaryDirectory(prefix="xs-", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        endpoints = Endpoints(Path(name))
        for path in endpoints.sockets[1:]:
            path.touch(0o600)
        listener.bind(str(endpoints.session))
        endpoints.session.chmod(0o600)
        listener.listen(16)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # shut down
                with connection:
                    connection.sendall(greeting)
                    connection.settimeout(10)
                    while connection.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield endpoints.directory
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("version", OTHERS, ids=str)
def test_another_version(tmp_path: Path, version: ProtocolVersion) -> None:
    older = "daemon" if version < PROTOCOL_VERSION else "client"
    with (
        speaking(version) as directory,
        ComfyServer(
            tmp_path / "base",
            packs={"xdit_sidecar": packs.clone()},
            environment={"XDIT_SIDECAR_RUNTIME_DIR": str(directory)},
        ) as server,
    ):
        with pytest.raises(WorkflowFailed, match=f"the {older} is too old; update the") as failure:
            server.run(base(REMOTE))
        assert str(version) in str(failure.value)
        server.run(base(STOCK))
        expected = server.tensors("refused")["samples"]
        server.run(base(LOCAL))
        assert torch.equal(server.tensors("refused")["samples"], expected)
        assert re.search(rf"samples in ComfyUI: .*the {older} is too old", server.log)


def test_interrupt_is_quick(scene: NodesScene, capsys: pytest.CaptureFixture[str]) -> None:
    released = sorted(interrupted_after(scene, seed) for seed in range(90, 95))
    with capsys.disabled():
        times = ", ".join(f"{seconds * 1000:.0f}" for seconds in released)
        print(f"\ninterrupt: the prompt was released after {times} ms")
    assert released[2] < 0.1 * GUARD
    expected = scene.latent(base(STOCK, seed=84), "refused")
    assert (scene.latent(base(REMOTE, seed=84), "refused") - expected).abs().max() < 1e-4


def interrupted_after(scene: NodesScene, seed: int) -> float:
    """Seconds from the press of the button to the end of the prompt."""
    settings = replace(QUICK, steps=2000, seed=seed)
    workflow = workflows.text_to_image(REMOTE, settings, picture=False)
    with scene.server.listen() as listener:
        prompt = scene.server.queue(workflow, listener.client_id)
        listener.wait_for(samples)
        pressed = time.monotonic()
        scene.server.interrupt()
        released = listener.wait_until_done(prompt).at - pressed
        with pytest.raises(WorkflowInterrupted):
            scene.server.wait(prompt)
    return released


def test_daemon_killed_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_nodes(tmp_path / "scene", 1) as scene:
        coding = workflows.coding(SHARED, QUICK, save="coded")
        scene.server.run(coding)
        before = scene.server.tensors("coded-latent-image")["images"]
        workflow = workflows.text_to_image(SHARED, replace(QUICK, steps=2000), picture=False)
        with scene.server.listen() as listener:
            prompt = scene.server.queue(workflow, listener.client_id)
            listener.wait_for(samples)
            killed = time.monotonic()
            os.kill(scene.daemon.pid, signal.SIGKILL)
            failed = listener.wait_until_done(prompt).at - killed
            with pytest.raises(WorkflowFailed):
                scene.server.wait(prompt)
        with capsys.disabled():
            print(f"\ndaemon killed: the prompt failed after {failed * 1000:.0f} ms")
        assert failed < 3 * GUARD
        assert scene.daemon.process is not None
        scene.daemon.process.wait(10)
        scene.daemon.start()
        scene.daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        # The next prompt shares again, and there is one copy.
        again = workflows.coding(SHARED, replace(QUICK, prompt="again"), save="coded")
        scene.server.run(again)
        assert torch.equal(scene.server.tensors("coded-latent-image")["images"], before)
        status = scene.daemon.wait_for_status(lambda _: True)
        assert sorted(c.role for c in status.components) == ["clip_l", "t5", "vae"]
        assert all(c.state == "resident" and c.sessions for c in status.components)
        deadline = time.monotonic() + 30
        while regions_of(scene.server.pid) != 3:  # the old ones go with the next collection
            assert time.monotonic() < deadline, regions_of(scene.server.pid)
            time.sleep(0.2)


def regions_of(pid: int) -> int:
    """How many regions a process has mapped."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as lines:
        return len({line.split()[4] for line in lines if "xdit-sidecar" in line})
