"""XDiT Share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...protocol.errors import SidecarError
from ..link import explain, link
from ..sharing import share_clip, share_vae


class Share(io.ComfyNode):
    """Hands over a VAE and a CLIP that other nodes loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTShare",
            display_name="XDiT Share",
            category="xDiT",
            description=(
                "Gives the weights of a VAE or CLIP from any loader to the daemon, so that its "
                "ranks and other ComfyUIs use the same copy. The objects stay usable by all nodes."
            ),
            inputs=[
                io.Vae.Input("vae", optional=True, tooltip="A FLUX.1 VAE from any loader."),
                io.Clip.Input("clip", optional=True, tooltip="CLIP-L and T5 from any loader."),
            ],
            outputs=[io.Vae.Output(), io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().epoch()

    @classmethod
    def execute(cls, vae: Any = None, clip: Any = None) -> io.NodeOutput:
        """The same objects, their weights in regions."""
        try:
            return io.NodeOutput(
                None if vae is None else share_vae(link(), vae),
                None if clip is None else share_clip(link(), clip),
            )
        except SidecarError as error:
            raise RuntimeError(explain(error)) from None
