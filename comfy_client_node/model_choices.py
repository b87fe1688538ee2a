"""What a node that loads a MODEL asks: how the ranks sample it, and what if they cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from comfy_api.latest import io

from ..protocol import messages as m
from .fallback import ON_PROBLEM, STOP

_DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_FP8_FAST = "fp8_e4m3fn_fast"  # as ComfyUI's own loader calls it
_AUTO = "auto"
_DEGREES = [_AUTO, "1", "2", "4", "8"]


class ModelChoices(NamedTuple):
    """The values of `choice_inputs`."""

    dtype: torch.dtype | None  # None: ComfyUI's own choice for the file
    fp8_matmul: bool
    degrees: m.Degrees | None  # None: the daemon's choice
    on_problem: str
    keep: bool

    @classmethod
    def of(
        cls,
        weight_dtype: str = "default",
        ulysses: str = _AUTO,
        ring: str = "1",
        cfg_parallel: str = "1",
        on_problem: str = STOP,
        keep_resident: bool = True,
    ) -> ModelChoices:
        """As ComfyUI passes them; what a workflow does not have is as by default."""
        degrees = None
        if ulysses != _AUTO:
            degrees = m.Degrees(ulysses=int(ulysses), ring=int(ring), cfg=int(cfg_parallel))
        fast = weight_dtype == _FP8_FAST
        dtype = None if fast else _DTYPES[weight_dtype]
        return cls(dtype, fast, degrees, on_problem, keep_resident)

    @property
    def remote_options(self) -> dict[str, Any]:
        """For :func:`.remote_model.load_remote_model`."""
        return {
            "dtype": self.dtype,
            "fp8_matmul": self.fp8_matmul,
            "degrees": self.degrees,
            "keep": self.keep,
        }

    @property
    def model_options(self) -> dict[str, Any]:
        """For ComfyUI's own loaders, where the model is loaded here."""
        if self.fp8_matmul:
            return {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}
        return {} if self.dtype is None else {"dtype": self.dtype}


def choice_inputs(*, optional: bool = False) -> list[Any]:
    """In the order of their widgets; ``optional`` for a node that had none of them once."""
    return [
        io.Combo.Input(
            "weight_dtype",
            options=[*_DTYPES, _FP8_FAST],
            default="default",
            optional=optional,
            tooltip="What the ranks compute in; default is ComfyUI's own choice for the file and "
            "the GPU. fp8_e4m3fn_fast multiplies in fp8: faster on recent GPUs, and not the same "
            "picture.",
        ),
        io.Combo.Input(
            "ulysses",
            options=_DEGREES,
            default=_AUTO,
            optional=optional,
            tooltip="Ranks that share the attention heads. auto chooses all degrees for the "
            "model, the batch and the GPUs.",
        ),
        io.Combo.Input(
            "ring",
            options=_DEGREES[1:],
            default="1",
            optional=optional,
            tooltip="Ranks that share keys and values; used unless ulysses is auto.",
        ),
        io.Combo.Input(
            "cfg_parallel",
            options=["1", "2"],
            default="1",
            optional=optional,
            tooltip="2: conditional and unconditional rows on different ranks; used unless "
            "ulysses is auto.",
        ),
        io.Combo.Input(
            "on_problem",
            options=list(ON_PROBLEM),
            default=STOP,
            optional=optional,
            tooltip="When the daemon or the workflow makes sampling there impossible: stop with "
            "an error that says why, or load the model into ComfyUI and sample here, with a "
            "warning.",
        ),
        io.Boolean.Input(
            "keep_resident",
            default=True,
            optional=optional,
            tooltip="Keep the model in the daemon when ComfyUI drops it, so that it is there the "
            "next time. Off: its memory is freed, unless others use it.",
        ),
    ]
