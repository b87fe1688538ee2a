"""xdit-sidecar's nodes for ComfyUI: models, VAEs and text encoders that a daemon keeps resident.

ComfyUI calls :func:`comfy_entrypoint`. Nothing here is imported before that, and neither torch nor
ComfyUI by this module itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .extension import XDiTExtension

__all__ = ["comfy_entrypoint"]


async def comfy_entrypoint() -> XDiTExtension:
    """The extension that ComfyUI registers."""
    from .extension import XDiTExtension
    from .link import log_whereabouts
    from .panel_routes import register_panel

    log_whereabouts()
    register_panel()
    return XDiTExtension()
