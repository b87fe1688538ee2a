"""This pack's nodes in the place of stock ones, and a daemon for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comfyui import packs, tiny_checkpoints, workflows
from comfyui.server import ComfyServer
from comfyui.workflows import STOCK, Nodes, Settings
from daemon_process import DaemonProcess, running_daemon

LOADER = {
    "unet_name": tiny_checkpoints.DIFFUSION_MODEL,
    "weight_dtype": "default",
    "ulysses": "auto",
    "ring": "1",
    "cfg_parallel": "1",
    "on_problem": "stop",
    "keep_resident": True,
}
#: The one change that a workflow needs.
REMOTE = replace(STOCK, model="XDiTUNetLoader", model_inputs=LOADER)
LOCAL = replace(REMOTE, model_inputs={**LOADER, "on_problem": "sample locally"})
#: All loaders are ours.
SHARED = replace(
    REMOTE,
    vae="XDiTLoadVAE",
    clip="XDiTLoadDualCLIP",
    clip_inputs={
        "clip_name1": tiny_checkpoints.CLIP_L,
        "clip_name2": tiny_checkpoints.T5XXL,
    },
)
CHECKPOINT = Nodes(checkpoint="XDiTLoadCheckpoint")
CODED = replace(SHARED, decode="XDiTVAEDecode", encode_image="XDiTVAEEncode")


@dataclass
class NodesScene:
    """A ComfyUI with the pack, and its daemon."""

    daemon: DaemonProcess
    server: ComfyServer
    expected: dict[str, torch.Tensor] = field(default_factory=dict)  # by stock workflows

    def latent(self, workflow: workflows.Workflow, name: str) -> torch.Tensor:
        """What the workflow saved as ``name``."""
        self.server.run(workflow)
        return self.server.tensors(name)["samples"]


@contextlib.contextmanager
def running_nodes(
    directory: Path,
    ranks: int,
    *options: str,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    others: Mapping[str, Path] | None = None,
) -> Iterator[NodesScene]:
    """A daemon whose ranks are ready, and a ComfyUI that knows it.

    ``arguments``, ``environment`` and ``others``, further packs, are ComfyUI's, ``options`` the
    daemon's.
    """
    directory.mkdir(exist_ok=True)
    with (
        running_daemon(directory, "--ranks", str(ranks), *options) as daemon,
        comfy_of(daemon, directory / "base", arguments, environment, others) as server,
    ):
        if ranks:
            daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        yield NodesScene(daemon, server)


def comfy_of(
    daemon: DaemonProcess,
    base: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    others: Mapping[str, Path] | None = None,
) -> ComfyServer:
    """A ComfyUI with the pack that uses this daemon; start it."""
    return ComfyServer(
        base,
        packs={"xdit_sidecar": packs.clone(), **(others or {})},
        arguments=arguments,
        environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir), **(environment or {})},
    )


def text_lora(strength: float) -> dict[str, Any]:
    """A node that puts a LoRA with text encoder keys behind the loaders."""
    return {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["model", 0],
            "clip": ["clip", 0],
            "lora_name": tiny_checkpoints.LORA_TEXT,
            "strength_model": 0.5,
            "strength_clip": strength,
        },
    }


def sampling(workflow: workflows.Workflow, *, vae: bool = False) -> workflows.Workflow:
    """The workflow with our KSampler in the place of the stock one."""
    sampler = dict(workflow["sampler"], class_type="XDiTKSampler")
    if vae:
        sampler["inputs"] = {**sampler["inputs"], "vae": workflow["decode"]["inputs"]["vae"]}
    return {**workflow, "sampler": sampler}


def behind_share(workflow: workflows.Workflow) -> workflows.Workflow:
    """The workflow with XDiT Share behind its loaders of VAE and CLIP."""
    share = {"class_type": "XDiTShare", "inputs": {"vae": ["vae", 0], "clip": ["clip", 0]}}
    places = {("vae", 0): ["share", 0], ("clip", 0): ["share", 1]}
    changed = {
        name: {
            **node,
            "inputs": {
                key: places.get(tuple(value), value) if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            },
        }
        for name, node in workflow.items()
    }
    return {**changed, "share": share}


QUICK = Settings(steps=8)
