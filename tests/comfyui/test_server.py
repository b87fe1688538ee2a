"""The harness: a real ComfyUI runs stock workflows on tiny files, is watched and disturbed."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfyui_checkout
import project
import psutil
import pytest
import torch
from comfyui import packs, tiny_checkpoints, workflows
from comfyui.server import (
    ComfyServer,
    WorkflowFailed,
    WorkflowInterrupted,
    WorkflowRefused,
)
from comfyui.workflows import Settings
from PIL import Image

LATENT = (1, 16, 16, 16)


def sample(server: ComfyServer, workflow: workflows.Workflow, name: str) -> torch.Tensor:
    server.run(workflow)
    latent = server.tensors(name)["samples"]
    assert latent.shape == LATENT
    assert latent.isfinite().all()
    return latent


def stock(server: ComfyServer, settings: Settings | None = None) -> torch.Tensor:
    return sample(server, workflows.text_to_image(settings=settings, picture=False), "result")


def test_same_workflow_gives_the_same_numbers(server: ComfyServer) -> None:
    entry = server.run(workflows.text_to_image(save="first"))
    server.free()
    assert server.loaded_models() == []
    server.run(workflows.text_to_image(save="second"))

    first, second = server.tensors("first"), server.tensors("second")
    assert torch.equal(first["samples"], second["samples"])
    images = [server.tensors(f"{name}-image")["images"] for name in ("first", "second")]
    assert torch.equal(*images)
    assert images[0].shape == (1, 128, 128, 3)
    assert images[0].std() > 0.05
    (saved,) = entry["outputs"]["save_image"]["images"]
    with Image.open(server.base / "output" / saved["filename"]) as picture:
        assert picture.size == (128, 128)
    assert "Flux" in server.loaded_models()


def test_what_was_run_before_is_not_run_again(server: ComfyServer) -> None:
    server.run(workflows.text_to_image(save="once"))
    with server.listen() as listener:
        server.run(workflows.text_to_image(save="twice"), listener)
        assert not listener.named("progress")


def test_eight_steps_take_about_a_second(server: ComfyServer) -> None:
    server.run(workflows.text_to_image(settings=Settings(seed=100)))
    start = time.monotonic()
    server.run(workflows.text_to_image(settings=Settings(seed=101, steps=8)))
    assert time.monotonic() - start < 10  # a busy machine


@pytest.mark.parametrize(("metadata", "binary"), [(True, 4), (False, 1)])
def test_progress_and_previews_arrive(server: ComfyServer, metadata: bool, binary: int) -> None:
    settings = Settings(seed=20 + binary, steps=5)
    with server.listen(previews_with_metadata=metadata) as listener:
        start = time.monotonic()
        prompt_id = server.queue(workflows.text_to_image(settings=settings), listener.client_id)
        server.wait(prompt_id)
        last = listener.wait_until_done(prompt_id)

        # What another test left may still be running before it.
        told = listener.named("progress", prompt_id)
        progress = [event for event in told if event.data["node"] == "sampler"]
        executing = listener.named("executing", prompt_id)
        executed = [event.data["node"] for event in executing]
        began = executing[executed.index("sampler")].at
        previews = [event for event in listener.named("preview") if event.at >= began]
    assert [event.data["value"] for event in progress] == [1, 2, 3, 4, 5]
    assert {event.data["max"] for event in progress} == {5}
    assert len(previews) == 5
    assert {event.binary for event in previews} == {binary}
    for event in previews:
        assert start <= event.at <= last.at
        assert event.data["image_type"] == "image/jpeg"
        assert event.data.get("node_id") == ("sampler" if metadata else None)
        with Image.open(io.BytesIO(event.image)) as picture:
            assert picture.size == (512, 512)  # ComfyUI enlarges it
    assert executed.index("sampler") < executed.index("decode") < executed.index(None)
    assert listener.named("status")


def test_interrupt_stops_a_long_prompt(server: ComfyServer) -> None:
    settings = Settings(seed=30, steps=10000)
    with server.listen() as listener:
        prompt_id = server.queue(
            workflows.text_to_image(settings=settings, picture=False), listener.client_id
        )
        listener.wait_for(lambda event: event.name == "progress")
        start = time.monotonic()
        server.interrupt("another prompt")
        server.interrupt(prompt_id)
        with pytest.raises(WorkflowInterrupted, match="sampler"):
            server.wait(prompt_id)
        assert time.monotonic() - start < 5
        listener.wait_until_done(prompt_id)
    stock(server, Settings(seed=31))


def test_killed_server_leaves_nothing_and_comes_back(tmp_path: Path) -> None:
    server = ComfyServer(tmp_path / "base").start()
    try:
        settings = Settings(steps=10000)
        with server.listen() as listener:
            prompt_id = server.queue(
                workflows.text_to_image(settings=settings, picture=False), listener.client_id
            )
            listener.wait_for(lambda event: event.name == "progress")
            server.kill()
            with pytest.raises(AssertionError, match="ComfyUI ended with -9"):
                server.wait(prompt_id)
            with pytest.raises(AssertionError, match="the connection ended"):
                listener.wait_until_done(prompt_id)
        assert not psutil.pid_exists(server.pid)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", server.port))

        server.start()
        stock(server)
    finally:
        server.stop()


def test_without_comfyui_tests_are_skipped_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(comfyui_checkout.OTHER, raising=False)
    monkeypatch.setattr(comfyui_checkout, "_provide", lambda: "no route to any index")
    with pytest.raises(pytest.skip.Exception, match=r"NOT TESTED AGAINST COMFYUI.*no route"):
        ComfyServer(tmp_path / "base")


def test_arguments_that_do_not_start(tmp_path: Path) -> None:
    server = ComfyServer(tmp_path / "base", arguments=["--no-such-option"])
    with pytest.raises(AssertionError, match="unrecognized arguments: --no-such-option"):
        server.start()


@pytest.mark.parametrize(
    "build",
    [
        workflows.advanced,
        workflows.custom,
        lambda **how: workflows.custom(guider="CFGGuider", **how),
        lambda **how: workflows.text_to_image(workflows.WHOLE_CHECKPOINT, **how),
    ],
    ids=["advanced", "basic guider", "cfg guider", "whole checkpoint"],
)
def test_other_ways_to_the_same_latent(
    server: ComfyServer, build: Callable[..., workflows.Workflow]
) -> None:
    assert torch.equal(sample(server, build(save="other"), "other"), stock(server))


def test_prompt_and_guidance_reach_the_model(server: ComfyServer) -> None:
    usual = stock(server)
    for settings in (Settings(prompt="a cat"), Settings(guidance=1.0), Settings(seed=8)):
        assert not torch.equal(stock(server, settings), usual)


def test_cfg_uses_the_negative_prompt(server: ComfyServer) -> None:
    first, second = (
        stock(server, Settings(cfg=3.0, negative=negative)) for negative in ("blurry", "sharp")
    )
    assert not torch.equal(first, second)


def test_steps_are_shared_between_samplers(server: ComfyServer) -> None:
    half = workflows.advanced(end=2, leftover_noise=True, save="half")
    assert not torch.equal(sample(server, half, "half"), stock(server))


def test_picture_to_picture(server: ComfyServer) -> None:
    workflow = workflows.image_to_image(save="changed")
    workflow["save_source"] = saving("source", samples=["latent", 0])
    changed = sample(server, workflow, "changed")
    source = server.tensors("source")["samples"]
    assert source.shape == LATENT
    assert not torch.equal(changed, source)


def test_mask_protects_the_right_half(server: ComfyServer) -> None:
    workflow = workflows.masked(save="masked")
    workflow["save_source"] = saving("source", samples=["latent", 0])
    changed = sample(server, workflow, "masked")
    source = server.tensors("source")["samples"]
    torch.testing.assert_close(changed[..., 17:], source[..., 17:])
    assert (changed[..., :15] - source[..., :15]).abs().mean() > 0.1


def test_loras_change_the_latent(server: ComfyServer) -> None:
    one = (tiny_checkpoints.LORA, 0.8)
    other = (tiny_checkpoints.LORA_OTHER, -0.5)
    found = [stock(server, Settings(loras=loras)) for loras in ((), (one,), (one, other))]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert torch.equal(stock(server), found[0])
    assert "lora key not loaded" not in server.log


def test_kontext_sees_its_references(server: ComfyServer) -> None:
    pictures = [tiny_checkpoints.PICTURE_OTHER, tiny_checkpoints.PICTURE]
    one, two = (
        sample(server, workflows.kontext(references=references, save="kontext"), "kontext")
        for references in (pictures[:1], pictures)
    )
    assert not torch.equal(one, stock(server))
    assert not torch.equal(one, two)


def test_conditioning_is_saved(server: ComfyServer) -> None:
    workflow = workflows.encode_only(save="words")
    server.run(workflow)
    found = server.tensors("words")
    assert found["conditioning.0.cond"].shape == (1, 256, tiny_checkpoints.T5_SIZES.width)
    assert found["conditioning.0.pooled_output"].shape == (1, tiny_checkpoints.CLIP_SIZES.width)
    assert found["conditioning.0.guidance"] == 3.5


@pytest.mark.parametrize(
    "file", [tiny_checkpoints.DIFFUSION_MODEL, tiny_checkpoints.DIFFUSION_MODEL_BF16]
)
def test_parameters_are_reported(server: ComfyServer, file: str) -> None:
    nodes = workflows.Nodes(model_inputs={"unet_name": file, "weight_dtype": "default"})
    entry = server.run(workflows.report(nodes))
    found: list[dict[str, Any]] = entry["outputs"]["report"]["parameters"]
    at_rest = {
        part: {each["dtype"] for each in found if each["of"] == part and len(each["shape"]) > 1}
        for part in ("model", "clip", "vae")
    }
    assert at_rest["model"] == {"float32"}  # on the CPU, bf16 files are widened
    assert at_rest["vae"] == {"float32"}
    assert "float16" in at_rest["clip"]
    assert {each["device"] for each in found} == {"cpu"}
    by_name = {each["name"]: each for each in found if each["of"] == "model"}
    first = by_name["diffusion_model.img_in.weight"]
    width = tiny_checkpoints.FLUX_SIZES.width
    assert first["shape"] == [width, tiny_checkpoints.FLUX_SIZES.inputs]
    assert first["data_ptr"]


def test_refused_workflow_is_explained(server: ComfyServer) -> None:
    workflow = workflows.text_to_image()
    workflow["vae"]["inputs"]["vae_name"] = "no-such.safetensors"
    with pytest.raises(WorkflowRefused, match=r"node vae \(VAELoader\).*no-such.safetensors"):
        server.run(workflow)


def test_failing_node_is_named(server: ComfyServer) -> None:
    workflow = workflows.text_to_image(picture=False, save="no-such-folder/latent")
    with pytest.raises(WorkflowFailed, match=r"node save_latent \(TestSaveTensors\)") as caught:
        server.run(workflow)
    assert caught.value.node_id == "save_latent"


def test_nodes_are_described(server: ComfyServer) -> None:
    assert server.object_info("KSampler")["input"]["required"]["cfg"]
    files = server.object_info("UNETLoader")["input"]["required"]["unet_name"][0]
    assert tiny_checkpoints.DIFFUSION_MODEL in files


def test_clone_is_among_the_custom_nodes(server: ComfyServer) -> None:
    link = server.base / "custom_nodes" / project.PACKAGE
    assert link.resolve() == project.ROOT
    assert f"seconds: {server.base}/custom_nodes/test_shim" in server.log
    assert f"custom_nodes/{project.PACKAGE}" in server.log


def test_installed_package_has_no_tests(tmp_path: Path) -> None:
    folder = packs.installed(tmp_path)
    assert (folder / "__init__.py").exists()
    assert not (folder / "tests").exists()


def saving(name: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": "TestSaveTensors", "inputs": {"name": name, **inputs}}
