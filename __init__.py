"""xdit-sidecar: xDiT models that stay on the GPUs while ComfyUI comes and goes.

Importing this package needs nothing but the standard library: no torch, no GPU, no daemon. In
ComfyUI's ``custom_nodes`` the repository is a node pack.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """ComfyUI's entry to the nodes. Raises ImportError where their requirements are missing."""
    try:
        from .comfy_client_node import comfy_entrypoint as enter

        return await enter()
    except ModuleNotFoundError as error:
        if error.name not in ("zmq", "msgpack", "msgspec"):
            raise
        raise ImportError(
            f"the nodes of xdit-sidecar need {error.name}, which this ComfyUI's environment lacks: "
            "install the pack's requirements.txt there with pip, then start ComfyUI again"
        ) from None
