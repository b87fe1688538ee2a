"""XDiT UNet Loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..fallback import install_check
from ..link import link
from ..local_loading import shared_or_local
from ..model_choices import ModelChoices, choice_inputs
from ..remote_model import load_remote_model

_FOLDER = "diffusion_models"


class LoadModel(io.ComfyNode):
    """A MODEL without weights in ComfyUI: each forward is answered by the daemon's ranks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTUNetLoader",
            display_name="XDiT UNet Loader",
            category="xDiT",
            description=(
                "Loads a FLUX.1 transformer into the xdit-sidecar daemon, where it stays resident "
                "on all GPUs, and gives a MODEL that samples there. Put it in the place of Load "
                "Diffusion Model; nothing else in the workflow changes."
            ),
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A FLUX.1 file in models/diffusion_models (or models/unet).",
                ),
                *choice_inputs(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the model again."""
        return link().epoch()

    @classmethod
    def execute(cls, unet_name: str, **values: Any) -> io.NodeOutput:
        """Hand the file over and give the model; ``values`` are those of `choice_inputs`."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, unet_name))
        choices = ModelChoices.of(**values)
        node = cls.hidden.unique_id

        def load_here() -> Any:
            return comfy.sd.load_diffusion_model(str(path), model_options=choices.model_options)

        def load() -> Any:
            model = load_remote_model(link(), path, **choices.remote_options)
            install_check(model, choices.on_problem, load_here, node)
            return model

        return io.NodeOutput(
            shared_or_local(load, load_here, choices.on_problem, node, "samples in ComfyUI")
        )
