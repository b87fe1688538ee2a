"""Load VAE (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ...protocol.errors import SidecarError
from ..link import explain, link
from ..loaders import load_shared_vae

_FOLDER = "vae"


class LoadVAE(io.ComfyNode):
    """A stock VAE whose weights are shared with the daemon's ranks and other ComfyUIs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTLoadVAE",
            display_name="Load VAE (xDiT)",
            category="xDiT",
            description=(
                "Load VAE whose weights are held by the xdit-sidecar daemon: one copy for all "
                "ComfyUIs and the ranks, still there when ComfyUI restarts."
            ),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A FLUX.1 VAE in models/vae.",
                )
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().epoch()

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        """Attach the VAE, or hand it over."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, vae_name))
        try:
            return io.NodeOutput(load_shared_vae(link(), path))
        except SidecarError as error:
            raise RuntimeError(explain(error)) from None
