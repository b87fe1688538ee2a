"""What the death of a ComfyUI, of the ranks or of the daemon costs a workflow."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import page_cache
import pytest
import torch
from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import CODED, LOCAL, QUICK, REMOTE, SHARED, NodesScene, running_nodes
from comfyui.server import WorkflowFailed
from comfyui.workflows import STOCK, Settings

pytestmark = pytest.mark.timeout(300)

SAME = 1e-4
LONG = replace(QUICK, steps=2000, seed=61)


def compare(scene: NodesScene, settings: Settings, nodes: workflows.Nodes = SHARED) -> None:
    """Our nodes' latent is the stock ones'."""
    expected = scene.latent(workflows.text_to_image(STOCK, settings, save="stock"), "stock")
    found = scene.latent(workflows.text_to_image(nodes, settings, save="ours"), "ours")
    assert (found - expected).abs().max() < SAME


def begin_long_run(scene: NodesScene) -> str:
    """A prompt that samples until it is stopped."""
    with scene.server.listen() as listener:
        prompt = scene.server.queue(
            workflows.text_to_image(SHARED, LONG, picture=False), listener.client_id
        )
        # Of the sampler: loaders have progress bars, too.
        listener.wait_for(lambda e: e.name == "progress" and e.data["node"] == "sampler")
    return prompt


def rank_dies_while_coding(scene: NodesScene) -> None:
    """A picture that the ranks encode and decode comes out as without a death."""
    scene.server.run(workflows.coding(STOCK, save="stock"))
    expected = scene.server.tensors("stock-latent-image")["images"]
    # So that the ranks have the VAE open: what dies is then a turn that has begun, and not one that
    # the new ranks simply do.
    scene.server.run(workflows.text_to_image(CODED, replace(QUICK, seed=68)))
    rank = scene.daemon.wait_for_status(lambda s: s.group.state == "ready", 90).ranks[1].pid
    os.kill(rank, signal.SIGSTOP)  # so that it dies over the job, and not before or after
    known = len(scene.server.log)
    prompt = scene.server.queue(workflows.coding(CODED, save="ours"))
    scene.daemon.wait_for_status(lambda s: s.group.jobs == 1)
    time.sleep(0.5)  # it has its turn
    os.kill(rank, signal.SIGKILL)
    scene.server.wait(prompt, 120)
    assert "trying once more" in scene.server.log[known:]
    found = scene.server.tensors("ours-latent-image")["images"]
    assert (found - expected).abs().max() < 1e-3


def test_deaths(tmp_path: Path) -> None:
    with running_nodes(tmp_path / "scene", 2) as scene:
        compare(scene, replace(QUICK, seed=60))
        assert "read " in scene.server.log

        # A rank: the run goes on when the ranks are back.
        pids = [rank.pid for rank in scene.daemon.wait_for_status(lambda s: True).ranks]
        os.kill(pids[1], signal.SIGKILL)
        compare(scene, replace(QUICK, seed=62))

        rank_dies_while_coding(scene)

        # ComfyUI, in the middle of a run: everything is attached again, nothing is read.
        begin_long_run(scene)
        scene.server.kill()
        known = len(scene.server.log)
        scene.server.start()
        compare(scene, replace(QUICK, seed=63))
        again = [line for line in scene.server.log[known:].splitlines() if "xDiT: " in line]
        assert [line for line in again if "was resident" in line]
        assert not [line for line in again if ", read " in line]

        # The daemon, in the middle of a run: the prompt ends with an error at once.
        prompt = begin_long_run(scene)
        os.kill(scene.daemon.pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(WorkflowFailed, match=r"daemon ended the session.*xdit-sidecar serve"):
            scene.server.wait(prompt)
        assert time.monotonic() - killed < 10  # promised: 3
        assert scene.daemon.process is not None
        scene.daemon.process.wait(10)
        shared_parts_go_on(scene)

        # Without a daemon: an error that says what to do, or ComfyUI samples and says so.
        with pytest.raises(WorkflowFailed, match="xdit-sidecar serve"):
            scene.server.run(workflows.text_to_image(REMOTE, replace(QUICK, seed=64)))
        settings = replace(QUICK, seed=65)
        expected = scene.latent(workflows.text_to_image(STOCK, settings, save="stock"), "stock")
        found = scene.latent(workflows.text_to_image(LOCAL, settings, save="local"), "local")
        assert torch.equal(found, expected)
        assert "samples in ComfyUI" in scene.server.log

        # Another daemon: the loaders see it and hand everything over again.
        scene.daemon.start()
        scene.daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        compare(scene, replace(QUICK, seed=66))
        status = scene.daemon.wait_for_status(lambda s: True)
        roles = sorted(component.role for component in status.components)
        assert roles == ["clip_l", "t5", "transformer", "vae"]


def shared_parts_go_on(scene: NodesScene) -> None:
    """VAE and CLIP code without a daemon, as they were loaded before; nothing is loaded here."""
    settings = replace(QUICK, prompt="nobody holds it")
    known = len(scene.server.log)
    for number in range(2):  # the second prompt with another text, so that it is encoded
        again = replace(settings, prompt=f"{settings.prompt} {number}")
        scene.server.run(workflows.coding(SHARED, again, save="ours"))
    assert "xDiT: " not in scene.server.log[known:]
    scene.server.run(workflows.coding(STOCK, again, save="stock"))
    for name in ("", "-latent", "-latent-image"):
        found, expected = (scene.server.tensors(f"{n}{name}") for n in ("ours", "stock"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_nothing_is_read_again(tmp_path: Path) -> None:
    """Not by what the nodes say, but by what the kernel has in its page cache afterwards."""
    settings = replace(QUICK, seed=67)
    with running_nodes(tmp_path / "scene", 1) as scene:
        models = scene.server.base / "models"
        files = [
            models / "diffusion_models" / tiny_checkpoints.DIFFUSION_MODEL,
            models / "text_encoders" / tiny_checkpoints.CLIP_L,
            models / "text_encoders" / tiny_checkpoints.T5XXL,
            models / "vae" / tiny_checkpoints.AUTOENCODER,
        ]

        def read() -> list[float]:
            """The part of each file that a run in the daemon needs to be read."""
            for file in files:
                page_cache.forget(file)
            scene.server.run(workflows.text_to_image(SHARED, settings, save="ours"))
            return [page_cache.cached_bytes(file) / file.stat().st_size for file in files]

        # Not all: the kernel may forget some pages at once where memory is short.
        assert min(read()) > 0.8
        expected = scene.server.tensors("ours")["samples"]
        begin_long_run(scene)
        scene.server.kill()
        scene.server.start()
        assert max(read()) < 0.1  # headers, and what the kernel reads ahead
        assert torch.equal(scene.server.tensors("ours")["samples"], expected)
