"""What becomes of a loader that cannot use the daemon: it stops, or ComfyUI loads, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.latest import io

from ..protocol.errors import SidecarError
from .fallback import STOP, tell
from .link import explain

LOAD_HERE = "load in ComfyUI"
_Loaded = TypeVar("_Loaded")


class CannotBeShared(RuntimeError):
    """An object whose weights are not ComfyUI's plain tensors."""


def on_problem_input() -> Any:
    """For nodes whose objects are shared; not the MODEL's, which samples somewhere else."""
    return io.Combo.Input(
        "on_problem",
        options=[STOP, LOAD_HERE],
        default=STOP,
        optional=True,  # workflows from before it was there
        tooltip="When the daemon cannot hold the weights: stop with an error that says why, or "
        "have them in this ComfyUI alone, with a warning.",
    )


def shared_or_local(
    share: Callable[[], _Loaded],
    load_here: Callable[[], _Loaded],
    on_problem: str,
    node: str | None,
    instead: str = "in this ComfyUI alone",
) -> _Loaded:
    """What ``share`` gives; if it cannot, what ``load_here`` gives, unless that is to stop.

    ``instead`` is the warning's word for that. Raises RuntimeError for people at the node.
    """
    try:
        return share()
    except (SidecarError, CannotBeShared) as error:
        why = explain(error) if isinstance(error, SidecarError) else str(error)
        if on_problem == STOP:
            raise RuntimeError(why) from None
    tell(node, f"{instead}: {why}")
    return load_here()
