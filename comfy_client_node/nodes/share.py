"""XDiT Share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..fallback import STOP
from ..link import link
from ..local_loading import on_problem_input, shared_or_local
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
                on_problem_input(),
            ],
            outputs=[io.Vae.Output(), io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """A restarted daemon has to be given the weights again."""
        return link().kept_epoch()

    @classmethod
    def execute(cls, vae: Any = None, clip: Any = None, on_problem: str = STOP) -> io.NodeOutput:
        """The same objects, their weights in regions."""

        def share() -> tuple[Any, Any]:
            return (
                None if vae is None else share_vae(link(), vae),
                None if clip is None else share_clip(link(), clip),
            )

        return io.NodeOutput(
            *shared_or_local(share, lambda: (vae, clip), on_problem, cls.hidden.unique_id)
        )
