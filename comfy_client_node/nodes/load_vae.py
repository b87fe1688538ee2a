"""Load VAE (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..fallback import STOP
from ..link import link
from ..loaders import load_shared_vae
from ..local_loading import on_problem_input, shared_or_local

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
                ),
                on_problem_input(),
            ],
            outputs=[io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().kept_epoch()

    @classmethod
    def execute(cls, vae_name: str, on_problem: str = STOP) -> io.NodeOutput:
        """Attach the VAE, or hand it over."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, vae_name))

        def load_here() -> Any:
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
            vae.throw_exception_if_invalid()
            return vae

        def share() -> Any:
            return load_shared_vae(link(), path)

        return io.NodeOutput(shared_or_local(share, load_here, on_problem, cls.hidden.unique_id))
