"""Load CLIP (xDiT) and Load Dual CLIP (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from ..fallback import STOP
from ..link import link
from ..loaders import TextEncoderFile, load_shared_clip
from ..local_loading import on_problem_input, shared_or_local

_FOLDER = "text_encoders"
_DEVICES = ["default", "cpu"]
_ABOUT = (
    "whose weights are held by the xdit-sidecar daemon: one copy for all ComfyUIs and the ranks, "
    "still there when ComfyUI restarts."
)


def _file_input(name: str, what: str) -> Any:
    return io.Combo.Input(
        name,
        options=folder_paths.get_filename_list(_FOLDER),
        tooltip=f"{what} in models/text_encoders.",
    )


def _device_input() -> Any:
    return io.Combo.Input(
        "device",
        options=_DEVICES,
        default="default",
        optional=True,
        tooltip="cpu keeps the weights in host memory, shared there; the ranks then make one copy "
        "on their GPUs if they need it.",
    )


def _load(
    names: list[str], clip_type: Any, device: str, on_problem: str, node: str | None
) -> io.NodeOutput:
    paths = [Path(folder_paths.get_full_path_or_raise(_FOLDER, name)) for name in names]
    embeddings = folder_paths.get_folder_paths("embeddings")

    def share() -> Any:
        return load_shared_clip(
            link(),
            [TextEncoderFile(path) for path in paths],
            clip_type,
            embeddings=embeddings,
            on_cpu=device == "cpu",
        )

    def load_here() -> Any:
        cpu = torch.device("cpu")
        return comfy.sd.load_clip(
            ckpt_paths=[str(path) for path in paths],
            embedding_directory=embeddings,
            clip_type=clip_type,
            model_options={"load_device": cpu, "offload_device": cpu} if device == "cpu" else {},
        )

    return io.NodeOutput(shared_or_local(share, load_here, on_problem, node))


class LoadCLIP(io.ComfyNode):
    """A stock CLIP of one shared text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTLoadCLIP",
            display_name="Load CLIP (xDiT)",
            category="xDiT",
            description=f"Load CLIP, one text encoder, {_ABOUT}",
            inputs=[_file_input("clip_name", "CLIP-L or T5"), _device_input(), on_problem_input()],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().kept_epoch()

    @classmethod
    def execute(
        cls, clip_name: str, device: str = "default", on_problem: str = STOP
    ) -> io.NodeOutput:
        """Attach the encoder, or hand it over."""
        kind = comfy.sd.CLIPType.STABLE_DIFFUSION
        return _load([clip_name], kind, device, on_problem, cls.hidden.unique_id)


class LoadDualCLIP(io.ComfyNode):
    """A stock CLIP of FLUX.1's two shared text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTLoadDualCLIP",
            display_name="Load Dual CLIP (xDiT)",
            category="xDiT",
            description=f"DualCLIPLoader for FLUX.1, {_ABOUT}",
            inputs=[
                _file_input("clip_name1", "CLIP-L or T5"),
                _file_input("clip_name2", "The other one"),
                _device_input(),
                on_problem_input(),
            ],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().kept_epoch()

    @classmethod
    def execute(
        cls, clip_name1: str, clip_name2: str, device: str = "default", on_problem: str = STOP
    ) -> io.NodeOutput:
        """Attach the encoders, or hand them over."""
        names, kind = [clip_name1, clip_name2], comfy.sd.CLIPType.FLUX
        return _load(names, kind, device, on_problem, cls.hidden.unique_id)
