"""XDiT UNet Loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ...protocol import messages as m
from ...protocol.errors import SidecarError
from ..fallback import ON_PROBLEM, STOP, install_check, tell
from ..link import explain, link
from ..remote_model import load_remote_model

_FOLDER = "diffusion_models"
_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_AUTO = "auto"
_DEGREES = [_AUTO, "1", "2", "4", "8"]


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
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_DTYPES),
                    default="default",
                    tooltip="What the ranks compute in; default is ComfyUI's own choice for the "
                    "file and the GPU.",
                ),
                io.Combo.Input(
                    "ulysses",
                    options=_DEGREES,
                    default=_AUTO,
                    tooltip="Ranks that share the attention heads. auto chooses all degrees for "
                    "the model, the batch and the GPUs.",
                ),
                io.Combo.Input(
                    "ring",
                    options=_DEGREES[1:],
                    default="1",
                    tooltip="Ranks that share keys and values; used unless ulysses is auto.",
                ),
                io.Combo.Input(
                    "cfg_parallel",
                    options=["1", "2"],
                    default="1",
                    tooltip="2: conditional and unconditional rows on different ranks; used unless "
                    "ulysses is auto.",
                ),
                io.Combo.Input(
                    "on_problem",
                    options=list(ON_PROBLEM),
                    default=STOP,
                    tooltip="When the daemon or the workflow makes sampling there impossible: stop "
                    "with an error that says why, or load the model into ComfyUI and sample "
                    "here, with a warning.",
                ),
                io.Boolean.Input(
                    "keep_resident",
                    default=True,
                    tooltip="Keep the model in the daemon when ComfyUI drops it, so that it is "
                    "there the next time. Off: its memory is freed, unless others use it.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the model again."""
        return link().epoch()

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        ulysses: str,
        ring: str,
        cfg_parallel: str,
        on_problem: str,
        keep_resident: bool,
    ) -> io.NodeOutput:
        """Hand the file over and give the model."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, unet_name))
        dtype = _DTYPES[weight_dtype]
        degrees = None
        if ulysses != _AUTO:
            degrees = m.Degrees(ulysses=int(ulysses), ring=int(ring), cfg=int(cfg_parallel))

        def load_here() -> Any:
            return comfy.sd.load_diffusion_model(
                str(path), model_options={} if dtype is None else {"dtype": dtype}
            )

        try:
            model = load_remote_model(link(), path, dtype, degrees, keep=keep_resident)
        except SidecarError as error:
            if on_problem == STOP:
                raise RuntimeError(explain(error)) from None
            tell(cls.hidden.unique_id, f"samples in ComfyUI: {explain(error)}")
            return io.NodeOutput(load_here())
        install_check(model, on_problem, load_here, cls.hidden.unique_id)
        return io.NodeOutput(model)
