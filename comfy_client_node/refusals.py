"""What a forward by the ranks cannot do, and how it is told before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Of ``transformer_options``: code that ComfyUI's own blocks would call.
_PATCHES = ("patches", "patches_replace", "block_patches", "optimized_attention_override")
_COMPILE = "torch.compile"
# What functions call that patch blocks for a part of a step: ComfyUI's for nodes to use.
_PATCHER = "set_model_options_patch_replace"


class CannotBeRemote(RuntimeError):
    """The workflow asks for something that only a model inside ComfyUI can do."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"the daemon's ranks cannot do this: {what}. Remove it, or load the model with "
            "ComfyUI's own Load Diffusion Model node (or set the loader's on_problem to "
            '"sample locally")'
        )


def check_call(control: Any, options: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise CannotBeRemote if a call of the diffusion model cannot be answered by the ranks."""
    for problem in _problems_of_call(control, options, others):
        raise CannotBeRemote(problem)


def find_problem(patcher: Any, conds: Mapping[str, Any]) -> str | None:
    """What a run of a sampler would stumble over; None if the ranks can do it all.

    ``patcher`` is the ModelPatcher that is to be sampled, ``conds`` the guider's conditions.
    """
    options = patcher.model_options.get("transformer_options", {})
    for problem in (*_problems_of_call(None, options, {}), *_later(patcher.model_options)):
        return problem
    for group in conds.values():
        for cond in group or []:
            if cond.get("control") is not None:
                return "ControlNet"
            if cond.get("attention_mask") is not None:
                return "a mask of attention in the conditioning"
            if (hooks := cond.get("hooks")) is not None and any(map(_is_of_weights, hooks.hooks)):
                return "LoRA hooks in the conditioning, which change weights during the run"
    wrappers = getattr(patcher, "wrappers", {}).get("apply_model", {})
    if _COMPILE in wrappers or any("diffusion_model" in key for key in patcher.object_patches):
        return "compiling or replacing the diffusion model (its ranks compile by themselves)"
    return None


def _is_of_weights(hook: Any) -> bool:
    return getattr(getattr(hook, "hook_type", None), "name", "") == "Weight"


def _later(options: Mapping[str, Any]) -> Iterator[str]:
    """Functions of nodes that patch blocks only when a step calls them."""
    for value in options.values():
        for function in value if isinstance(value, list | tuple) else [value]:
            if _PATCHER in getattr(getattr(function, "__code__", None), "co_names", ()):
                node = function.__qualname__.partition(".")[0]
                yield f"patches of attention or blocks (by the node {node})"


def _problems_of_call(
    control: Any, options: Mapping[str, Any], others: Mapping[str, Any]
) -> Iterator[str]:
    if control is not None:
        yield "ControlNet"
    for name in _PATCHES:
        if found := options.get(name):
            kinds = ", ".join(map(str, found)) if isinstance(found, Mapping) else name
            yield f"patches of attention or blocks ({kinds})"
    if options.get("rope_options") is not None:
        yield "changed positions (rope_options)"
    if others.get("attention_mask") is not None:
        yield "a mask of attention in the conditioning"
