"""Which of xfuser's attention kernels computes a given dtype on a given device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .config import ConfigError

_HALF = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
_CUDNN_HEAD_SIZE = 128  # the largest, and it counts in eights


def choose_backend(dtype: torch.dtype, device: torch.device, ring: int, head_size: int) -> str:
    """The name of an xfuser backend that is right for these tensors and, with a ring, gives an LSE.

    xfuser's own choice on CUDA is cuDNN whatever the dtype, and cuDNN answers fp32 with NaN.
    Where no exchange needs the log-sum-exp, torch's own choice is as good and computes all
    dtypes; half precision on CUDA is the exception, where cuDNN is twice as fast (H200).
    Raises ConfigError where no kernel would do.
    """
    if device.type != "cuda":
        return "SDPA" if ring == 1 else "SDPA_FLASH"
    if dtype in _HALF:
        if _capability(device) < _AMPERE:
            return "SDPA_EFFICIENT"
        if head_size <= _CUDNN_HEAD_SIZE and head_size % 8 == 0 and _has_cudnn():
            return "CUDNN"
        return "SDPA_FLASH"
    if ring == 1:
        return "SDPA"
    if dtype == torch.float32:
        return "SDPA_EFFICIENT"
    raise ConfigError(f"ring attention on CUDA computes fp16, bf16 and fp32, not {dtype}")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_cudnn() -> bool:
    cudnn: Any = torch.backends.cudnn
    cuda: Any = torch.backends.cuda
    return bool(cudnn.is_available() and cuda.cudnn_sdp_enabled())
