"""Our loaders under dynamic VRAM, which newer versions of ComfyUI have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import comfyui_checkout
import pytest
import torch
from comfyui import packs, workflows
from comfyui.nodes_scene import QUICK, SHARED
from comfyui.server import ComfyServer
from daemon_process import DaemonProcess, running_daemon

pytestmark = pytest.mark.timeout(240)

PACK = Path(__file__).with_name("dynamic_pack")
# The VAE's file is in fp32: as on a GPU, it has to be converted.
ARGUMENTS = ["--bf16-vae"]


def picture(directory: Path, daemon: DaemonProcess, more: Mapping[str, Path]) -> list[torch.Tensor]:
    """Latent and picture of a workflow with our loaders, in a ComfyUI of its own."""
    with ComfyServer(
        directory,
        packs={"xdit_sidecar": packs.clone(), **more},
        arguments=ARGUMENTS,
        environment={"XDIT_SIDECAR_RUNTIME_DIR": str(daemon.runtime_dir)},
    ) as server:
        server.run(workflows.text_to_image(SHARED, replace(QUICK, seed=71), save="it"))
        return [server.tensors("it")["samples"], server.tensors("it-image")["images"]]


def test_parts_are_loaded_and_shared_alike(tmp_path: Path) -> None:
    if not comfyui_checkout.has_dynamic_vram():
        pytest.skip(f"this ComfyUI has no dynamic VRAM: {comfyui_checkout.OTHER} names another")
    with running_daemon(tmp_path, "--ranks", "1") as daemon:
        daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        usual = picture(tmp_path / "usual", daemon, {})
        resident = components(daemon)
        paged = picture(tmp_path / "paged", daemon, {"dynamic_pack": PACK})
        assert all(torch.equal(*both) for both in zip(usual, paged, strict=True))
        # Nothing in another dtype: it would be another component, of twice the size.
        assert components(daemon) == resident


def components(daemon: DaemonProcess) -> set[tuple[str, int]]:
    """Roles and bytes of what is resident; each ComfyUI has files of its own here."""
    status = daemon.wait_for_status(lambda s: True)
    return {(each.role, each.nbytes) for each in status.components}
