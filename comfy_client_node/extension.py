"""What ComfyUI gets from this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes.load_checkpoint import LoadCheckpoint
from .nodes.load_clip import LoadCLIP, LoadDualCLIP
from .nodes.load_model import LoadModel
from .nodes.load_vae import LoadVAE
from .nodes.sampler import KSampler
from .nodes.share import Share
from .nodes.status import Status
from .nodes.vae_coding import VAEDecode, VAEEncode


class XDiTExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """In the order of the menu."""
        return [
            *(LoadModel, LoadVAE, LoadCLIP, LoadDualCLIP, LoadCheckpoint),
            *(Share, KSampler, VAEDecode, VAEEncode, Status),
        ]
