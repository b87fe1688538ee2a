"""What ComfyUI gets from this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes.load_clip import LoadCLIP, LoadDualCLIP
from .nodes.load_model import LoadModel
from .nodes.load_vae import LoadVAE


class XDiTExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """In the order of the menu."""
        return [LoadModel, LoadVAE, LoadCLIP, LoadDualCLIP]
