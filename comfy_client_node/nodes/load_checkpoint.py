"""Load Checkpoint (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..fallback import STOP, install_check
from ..link import link
from ..loaders import TextEncoderFile, load_shared_clip, load_shared_vae
from ..local_loading import shared_or_local
from ..model_choices import ModelChoices, choice_inputs
from ..remote_model import load_remote_model
from ..shared_weights import first_prefix

_NAME = "Load Checkpoint (xDiT)"
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
            display_name=_NAME,
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
                ),
                *choice_inputs(optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, on_problem: str = STOP, **_: Any) -> str:
        """A restarted daemon has to be given the weights again.

        Without one VAE and CLIP work on; the model would not, if that is what to do about it.
        """
        return link().kept_epoch() if on_problem == STOP else link().epoch()

    @classmethod
    def execute(cls, ckpt_name: str, **values: Any) -> io.NodeOutput:
        """Attach all parts, or hand them over; ``values`` are those of `choice_inputs`."""
        path = Path(folder_paths.get_full_path_or_raise(_FOLDER, ckpt_name))
        choices = ModelChoices.of(**values)
        node = cls.hidden.unique_id
        embeddings = folder_paths.get_folder_paths("embeddings")

        def load_here() -> tuple[Any, Any, Any]:
            model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
                str(path), embedding_directory=embeddings, model_options=choices.model_options
            )
            return model, clip, vae

        def load_model_here() -> Any:
            return comfy.sd.load_checkpoint_guess_config(
                str(path),
                output_vae=False,
                output_clip=False,
                model_options=choices.model_options,
            )[0]

        def share() -> tuple[Any, Any, Any]:
            encoders = [
                TextEncoderFile(path, first_prefix(path, _CLIP_L, "CLIP-L")),
                TextEncoderFile(path, first_prefix(path, _T5, "T5")),
            ]
            vae_prefix = first_prefix(path, _VAE, "VAE")
            model = load_remote_model(link(), path, **choices.remote_options, node=_NAME)
            install_check(model, choices.on_problem, load_model_here, node)
            clip = load_shared_clip(link(), encoders, comfy.sd.CLIPType.FLUX, embeddings=embeddings)
            return model, clip, load_shared_vae(link(), path, vae_prefix)

        return io.NodeOutput(
            *shared_or_local(share, load_here, choices.on_problem, node, "samples in ComfyUI")
        )
