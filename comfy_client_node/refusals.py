"""What a forward by the ranks cannot do, as far as one call of the diffusion model shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ..protocol.messages.jobs import RefLatentsMethod

REFERENCE_METHODS = get_args(RefLatentsMethod)
#: Arguments of FLUX's forward that have a place of their own in a job.
KNOWN_ARGUMENTS = ("attention_mask", "ref_latents_method")
# Of ``transformer_options``: code that ComfyUI's own blocks would call.
_PATCHES = ("patches", "patches_replace", "block_patches", "optimized_attention_override")


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
    """Raise CannotBeRemote if a call of the diffusion model cannot be answered by the ranks.

    ``others``: arguments that have no name in its signature.
    """
    for problem in problems_of_call(control, options, others):
        raise CannotBeRemote(problem)


def problems_of_call(
    control: Any, options: Mapping[str, Any], others: Mapping[str, Any]
) -> Iterator[str]:
    """See `check_call`."""
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
    method = others.get("ref_latents_method")
    if method is not None and method not in REFERENCE_METHODS:
        yield f"reference latents by the method {method}"
    for name, value in others.items():
        if value is not None and name not in KNOWN_ARGUMENTS:
            yield f"the argument {name} of the diffusion model, which is not known here"
