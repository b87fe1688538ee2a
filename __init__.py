"""xdit-sidecar: xDiT models that stay on the GPUs while ComfyUI comes and goes.

Importing this package needs nothing but the standard library: no torch, no GPU, no daemon. In
ComfyUI's ``custom_nodes`` the repository is a node pack.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__version__ = "0.1.0"

__all__ = ["WEB_DIRECTORY", "__version__", "comfy_entrypoint"]

# ComfyUI serves it to the browser: the status panel, and the nodes' help below docs/.
WEB_DIRECTORY: str | None = "./comfy_client_node/web"

if os.sep in __name__:  # as ComfyUI names the packs in custom_nodes
    from .comfy_client_node.one_pack import choose_web

    WEB_DIRECTORY = choose_web(sys.modules[__name__], "./comfy_client_node/web")


async def comfy_entrypoint() -> Any:
    """ComfyUI's entry to the nodes; those of an installed package go first.

    Raises ImportError where another pack was first, or their requirements are missing.
    """
    from .comfy_client_node.one_pack import check_first, find_installed

    this = sys.modules[__name__]
    check_first(this)
    if (installed := find_installed(this)) is not None:
        return await installed.comfy_entrypoint()
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
