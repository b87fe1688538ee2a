"""XDiT VAE Decode and XDiT VAE Encode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...protocol import messages as m
from ...protocol.errors import SidecarError
from ..link import Link, explain, link
from ..remote_sampling import run_vae


def _link() -> Link:
    try:
        return link()
    except SidecarError as error:
        raise RuntimeError(explain(error)) from None


def _vae_input() -> Any:
    return io.Vae.Input("vae", tooltip="Of Load VAE (xDiT), or behind XDiT Share.")


class VAEDecode(io.ComfyNode):
    """VAE Decode by the ranks, each a band of the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTVAEDecode",
            display_name="XDiT VAE Decode",
            category="xDiT",
            description="Decodes latents with the daemon's ranks, in parallel, in tiles where "
            "memory is short.",
            inputs=[io.Latent.Input("samples", tooltip="What is decoded."), _vae_input()],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: Any, vae: Any) -> io.NodeOutput:
        """Pictures of the latents."""
        return io.NodeOutput(run_vae(_link(), vae, m.Decode, "latent", samples["samples"]))


class VAEEncode(io.ComfyNode):
    """VAE Encode in the daemon."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTVAEEncode",
            display_name="XDiT VAE Encode",
            category="xDiT",
            description="Encodes pictures with the VAE that the daemon keeps resident.",
            inputs=[io.Image.Input("pixels", tooltip="What is encoded."), _vae_input()],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any) -> io.NodeOutput:
        """Latents of the pictures."""
        pictures = pixels[:, :, :, :3]
        latent = run_vae(_link(), vae, m.Encode, "image", pictures.float())
        return io.NodeOutput({"samples": latent})
