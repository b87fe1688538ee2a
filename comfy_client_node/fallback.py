"""What becomes of a run that the ranks cannot do: it stops, or ComfyUI samples, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension

from .problems import COMPILED, find_problem
from .ranks_jobs import RanksFailed
from .refusals import CannotBeRemote

_log = logging.getLogger("xdit_sidecar.comfyui")

STOP = "stop"
LOCALLY = "sample locally"
ON_PROBLEM = (STOP, LOCALLY)

_KEY = "xdit_sidecar"
_OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
# Of a ModelPatcher: dictionaries of what nodes have added, by kinds or names.
_BESIDE = (
    "callbacks",
    "injections",
    "additional_models",
    "weight_wrapper_patches",
    "hook_patches",
)
_BY_KIND = ("wrappers", "attachments", *_BESIDE[:4])


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


class Fallback:
    """What becomes of runs on a model: ``on_problem`` is the loader's setting.

    ``load_here`` loads the same model into ComfyUI, for "sample locally".
    """

    def __init__(self, on_problem: str, load_here: Callable[[], Any], node: str | None) -> None:
        self._on_problem = on_problem
        self._load_here = load_here
        self._node = node
        self._local: Any = None  # loaded at most once

    @classmethod
    def of(cls, model: Any) -> Fallback | None:
        """What a loader has installed with this ModelPatcher, or with what it is a clone of."""
        found: Fallback | None = model.get_attachment(_KEY)
        return found

    def check(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapper of whole runs: looks before one begins, and after what ended it."""
        guider = executor.class_obj
        # As they are now: a run that fails has changed them. Guiders have None for no condition.
        conds = {
            kind: None if group is None else [dict(cond) for cond in group]
            for kind, group in guider.conds.items()
        }
        try:
            if problem := find_problem(guider.model_patcher, conds):
                raise CannotBeRemote(problem)
            return executor(*args, **kwargs)
        except (CannotBeRemote, RanksFailed) as error:
            local = self.model_here(guider.model_patcher, error)
        remote = guider.model_patcher
        guider.model_patcher, guider.conds = local, conds
        _leave_uncompiled(guider.model_options["transformer_options"].get("wrappers", {}))
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_patcher = remote

    def model_here(self, remote: Any, error: CannotBeRemote | RanksFailed) -> Any:
        """The model inside ComfyUI, patched as ``remote``. Raises the error if that is to stop."""
        if self._on_problem == STOP:
            raise error
        if isinstance(error, CannotBeRemote):
            why = f"because the ranks cannot do this: {error.what}"
        else:
            why = f"because the daemon did not: {error}"
        # What TorchCompileModel compiled is the remote model, not the one that is loaded here.
        how = ", uncompiled," if COMPILED in _applied_by(remote.wrappers) else ","
        tell(self._node, f"samples in ComfyUI{how} {why}")
        if self._local is None:
            self._local = self._load_here()
        return move_patches(remote, self._local)


def install_check(
    model: Any, on_problem: str, load_here: Callable[[], Any], node: str | None
) -> None:
    """Have every run of a sampler on ``model`` (a ModelPatcher) checked before it begins."""
    fallback = Fallback(on_problem, load_here, node)
    model.set_attachments(_KEY, fallback)
    model.add_wrapper_with_key(_OUTER_SAMPLE, _KEY, fallback.check)


def added_by_others(patcher: Any) -> list[str]:
    """What of a remote ModelPatcher goes around a run, or into it, but is not this pack's."""
    wrappers = {kind: {*keyed} for kind, keyed in patcher.wrappers.items()}
    wrappers.get(_OUTER_SAMPLE, set()).discard(_KEY)
    found = [f"a wrapper ({kind})" for kind, keys in wrappers.items() if keys]
    return found + [name.replace("_", " ") for name in _BESIDE if getattr(patcher, name, None)]


def move_patches(source: Any, target: Any) -> Any:
    """A clone of ``target`` with everything that nodes have added to ``source``."""
    clone = target.clone()
    clone.patches = {key: list(entries) for key, entries in source.patches.items()}
    clone.patches_uuid = source.patches_uuid
    clone.object_patches = source.object_patches.copy()
    clone.model_options = source.model_options
    clone.hook_patches, clone.hook_mode = source.hook_patches, source.hook_mode
    for name in _BY_KIND:
        both = comfy.patcher_extension.merge_nested_dicts(
            getattr(clone, name, {}), getattr(source, name, {})
        )
        setattr(clone, name, both)
    _leave_uncompiled(clone.wrappers)
    # This model is not remote.
    clone.wrappers.get(_OUTER_SAMPLE, {}).pop(_KEY, None)
    clone.remove_attachments(_KEY)
    return clone


def _leave_uncompiled(wrappers: dict[str, dict[str, Any]]) -> None:
    """Without what puts the compiled model in its place: it was made of the remote one."""
    _applied_by(wrappers).pop(COMPILED, None)


def _applied_by(wrappers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return wrappers.get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {})
