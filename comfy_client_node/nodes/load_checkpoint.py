"""Load Checkpoint (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ...protocol.errors import SidecarError
from ..link import explain, link
from ..loaders import TextEncoderFile, load_shared_clip, load_shared_vae
from ..remote_model import load_remote_model
from ..shared_weights import first_prefix

_FOLDER = "checkpoints"
_VAE = ("vae.", "first_stage_model.")
_CLIP_L = ("text_encoders.clip_l.transformer.",)
_T5 = ("text_encoders.t5xxl.transformer.",)


class LoadCheckpoint(io.ComfyNode):
    """MODEL, CLIP and VAE of one file, all of them shared."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTLoadCheckpoint",
            display_name="Load Checkpoint (xDiT)",
            category="xDiT",
            description=(
                "XDiT UNet Loader, Load Dual CLIP (xDiT) and Load VAE (xDiT) in one, for a FLUX.1 "
                "checkpoint that has all of them."
            ),
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A FLUX.1 checkpoint in models/checkpoints.",
                )
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().epoch()

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        """Attach all parts, or hand them over."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, ckpt_name))
        try:
            encoders = [
                TextEncoderFile(path, first_prefix(path, _CLIP_L, "CLIP-L")),
                TextEncoderFile(path, first_prefix(path, _T5, "T5")),
            ]
            vae_prefix = first_prefix(path, _VAE, "VAE")
            model = load_remote_model(link(), path, None, None)
            clip = load_shared_clip(
                link(),
                encoders,
                comfy.sd.CLIPType.FLUX,
                embeddings=folder_paths.get_folder_paths("embeddings"),
            )
            vae = load_shared_vae(link(), path, vae_prefix)
        except SidecarError as error:
            raise RuntimeError(explain(error)) from None
        return io.NodeOutput(model, clip, vae)
