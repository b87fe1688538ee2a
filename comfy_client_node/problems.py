"""What a run of a sampler with the ranks would stumble over, told before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from .lora_layers import read_patches
from .refusals import CannotBeRemote, problems_of_call

# What functions call that patch blocks for a part of a step: ComfyUI's for nodes to use.
_PATCHER = "set_model_options_patch_replace"
#: Under this key ComfyUI wraps a model that is compiled.
COMPILED = "torch.compile"


def find_problem(patcher: Any, conds: Mapping[str, Any]) -> str | None:
    """What the ranks cannot do of a run; None if they can do it all.

    ``patcher`` is the ModelPatcher that is to be sampled, ``conds`` the guider's conditions.
    """
    return next(chain(_of_model(patcher), _of_conditions(conds)), None)


def _of_model(patcher: Any) -> Iterator[str]:
    options = patcher.model_options
    yield from problems_of_call(None, options.get("transformer_options", {}), {})
    yield from _later(options)
    if COMPILED in getattr(patcher, "wrappers", {}).get("apply_model", {}):
        yield "compiling the diffusion model (TorchCompileModel); the ranks compile by themselves"
    for key in patcher.object_patches:
        if "diffusion_model" in key:
            yield f"replacing {key}, which is not in this process"
    if names := getattr(patcher, "weight_wrapper_patches", None):
        yield f"functions that change weights as they are used ({next(iter(names))}…)"
    try:
        read_patches(patcher.patches)
    except CannotBeRemote as error:
        yield error.what


def _of_conditions(conds: Mapping[str, Iterable[Mapping[str, Any]] | None]) -> Iterator[str]:
    for cond in (cond for group in conds.values() for cond in group or ()):
        arguments = {
            "attention_mask": cond.get("attention_mask"),
            "ref_latents_method": cond.get("reference_latents_method"),
        }
        yield from problems_of_call(cond.get("control"), {}, arguments)
        if (hooks := cond.get("hooks")) is not None and any(map(_is_of_weights, hooks.hooks)):
            yield "LoRA hooks in the conditioning, which change weights during the run"


def _is_of_weights(hook: Any) -> bool:
    return getattr(getattr(hook, "hook_type", None), "name", "") == "Weight"


def _later(options: Mapping[str, Any]) -> Iterator[str]:
    """Functions of nodes that patch blocks only when a step calls them."""
    for value in options.values():
        for function in value if isinstance(value, list | tuple) else [value]:
            if _PATCHER in getattr(getattr(function, "__code__", None), "co_names", ()):
                node = function.__qualname__.partition(".")[0]
                yield f"patches of attention or blocks (by the node {node})"
