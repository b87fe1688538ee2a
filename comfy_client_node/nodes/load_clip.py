"""Load CLIP (xDiT) and Load Dual CLIP (xDiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ...protocol.errors import SidecarError
from ..link import explain, link
from ..loaders import TextEncoderFile, load_shared_clip

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


def _load(names: list[str], clip_type: str, device: str) -> io.NodeOutput:
    files = [
        TextEncoderFile(Path(folder_paths.get_full_path_or_raise(_FOLDER, name))) for name in names
    ]
    try:
        clip = load_shared_clip(
            link(),
            files,
            getattr(comfy.sd.CLIPType, clip_type.upper()),
            embeddings=folder_paths.get_folder_paths("embeddings"),
            on_cpu=device == "cpu",
        )
    except SidecarError as error:
        raise RuntimeError(explain(error)) from None
    return io.NodeOutput(clip)


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
            inputs=[_file_input("clip_name", "CLIP-L or T5"), _device_input()],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().epoch()

    @classmethod
    def execute(cls, clip_name: str, device: str = "default") -> io.NodeOutput:
        """Attach the encoder, or hand it over."""
        return _load([clip_name], "stable_diffusion", device)


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
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().epoch()

    @classmethod
    def execute(cls, clip_name1: str, clip_name2: str, device: str = "default") -> io.NodeOutput:
        """Attach the encoders, or hand them over."""
        return _load([clip_name1, clip_name2], "flux", device)
