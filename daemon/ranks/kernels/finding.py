"""Whether a device can run the kernels in Triton: found out by comparing what they give."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..code_cache import prepare_code_cache
from . import plain

# The sizes are FLUX's, but for the number of tokens.
_HEADS, _SIZE = 24, 128
_TEXT, _IMAGE = 3, 18
_EPS = 1e-6
_ROUNDINGS = 4  # of the dtype, that may differ


def find_kernels(like: Tensor) -> Any:
    """The module :mod:`.triton_kernels`, or None where it does not work for such tensors.

    Why not is said once, in the log.
    """
    return _find(like.device, like.dtype) if like.is_cuda else None


@cache
def _find(device: torch.device, dtype: torch.dtype) -> Any:
    try:
        # What Triton compiled before is run, see `code_cache`.
        if "TORCHINDUCTOR_CACHE_DIR" in os.environ and (problem := prepare_code_cache()):
            raise RuntimeError(problem)
        kernels = importlib.import_module(".triton_kernels", __package__)
        compare_kernels(kernels, device, dtype)
    except Exception as error:  # noqa: BLE001  of Triton, of a C compiler, of CUDA
        reason = " ".join(str(error).split())[:200]
        print(
            f"xdit-sidecar-ranks: steps between products go without kernels in Triton and take "
            f"longer ({dtype}): {type(error).__name__}: {reason}",
            file=sys.stderr,
            flush=True,
        )
        return None
    return kernels


def compare_kernels(kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError if they give something else than :mod:`.plain` there."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def project(count: int) -> plain.Projected:
        tokens = random(2, count, _HEADS * _SIZE).to(dtype)
        return plain.Projected(tokens, (1 + random(_SIZE) / 8).to(dtype))

    streams = [project(_TEXT), project(_IMAGE)]
    angles = random(_TEXT + _IMAGE, _SIZE)
    arguments = (streams, angles.cos(), angles.sin(), 2, _EPS)
    inner = 4 * random(2, _IMAGE, _SIZE).to(dtype)
    joined = [torch.zeros(2, _IMAGE, 3 * _SIZE, dtype=dtype, device=device) for _ in range(2)]
    for each, into in zip((plain, kernels), joined, strict=True):
        each.activate_into(into, inner, _SIZE)
    for given, expected in (
        (kernels.rotate_heads(*arguments), plain.rotate_heads(*arguments)),
        (joined[1], joined[0]),
    ):
        tolerance = _ROUNDINGS * torch.finfo(dtype).eps
        if not torch.allclose(given.float(), expected.float(), rtol=tolerance, atol=tolerance):
            raise RuntimeError("a kernel gives something else than torch does")
