"""Only there to be imported."""

from __future__ import annotations


def roi_align(*_: object, **__: object) -> None:
    """A name that ComfyUI imports."""
    raise NotImplementedError("torchvision is not installed")


deform_conv2d = roi_align
