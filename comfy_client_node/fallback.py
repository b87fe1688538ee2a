"""What becomes of a run that the ranks cannot do: it stops, or ComfyUI samples, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension

from .refusals import CannotBeRemote, find_problem

_log = logging.getLogger("xdit_sidecar.comfyui")

STOP = "stop"
LOCALLY = "sample locally"
ON_PROBLEM = (STOP, LOCALLY)

_KEY = "xdit_sidecar"


def tell(node: str | None, text: str) -> None:
    """A warning in the log and on the node."""
    _log.warning("xDiT: %s", text)
    _show(node, f"⚠ {text}")


def say(node: str | None, text: str) -> None:
    """A word on the node and in the log."""
    _log.info("xDiT: %s", text)
    _show(node, text)


def _show(node: str | None, text: str) -> None:
    if node is None:
        return
    from server import PromptServer

    if (server := getattr(PromptServer, "instance", None)) is not None:
        server.send_progress_text(text, node)


def install_check(
    model: Any, on_problem: str, load_here: Callable[[], Any], node: str | None
) -> None:
    """Have every run of a sampler on ``model`` (a ModelPatcher) checked before it begins.

    ``load_here`` loads the same model into ComfyUI, for ``on_problem`` = "sample locally".
    """
    local: list[Any] = []  # loaded at most once

    def check(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        # As they are now: a run that fails has changed them. Guiders have None for no condition.
        conds = {
            kind: None if group is None else [dict(cond) for cond in group]
            for kind, group in guider.conds.items()
        }
        problem = find_problem(guider.model_patcher, conds)
        if problem is None:
            try:
                return executor(*args, **kwargs)
            except CannotBeRemote as error:  # seen only by a forward
                problem = error.what
        if on_problem == STOP:
            raise CannotBeRemote(problem)
        tell(node, f"samples in ComfyUI, because the ranks cannot do this: {problem}")
        if not local:
            local.append(load_here())
        remote = guider.model_patcher
        guider.model_patcher, guider.conds = move_patches(remote, local[0]), conds
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_patcher = remote

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, _KEY, check)


def move_patches(source: Any, target: Any) -> Any:
    """A clone of ``target`` with the LoRAs, hooks, options and wrappers of ``source``."""
    clone = target.clone()
    clone.patches = {key: list(entries) for key, entries in source.patches.items()}
    clone.patches_uuid = source.patches_uuid
    clone.object_patches = source.object_patches.copy()
    clone.model_options = source.model_options
    clone.hook_patches, clone.hook_mode = source.hook_patches, source.hook_mode
    return clone
