"""XDiT Status."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io, ui

from ...protocol.errors import SidecarError
from ..link import explain, link
from ..status_text import describe


class Status(io.ComfyNode):
    """What the daemon keeps resident, as text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="XDiTStatus",
            display_name="XDiT Status",
            category="xDiT",
            description="What is resident in the daemon, where, how big, and shared by whom.",
            inputs=[],
            outputs=[io.String.Output()],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Asked anew each time."""
        return time.monotonic()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """The daemon's answer, or why there is none."""
        try:
            text = describe(link().client.status())
        except SidecarError as error:
            text = explain(error)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
