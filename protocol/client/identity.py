"""What a client tells the daemon about its process."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from ..messages import Hello

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def describe_process(
    name: str, *, host: str | None = None, dynamic_vram: bool | None = None
) -> Hello:
    """A hello for this process. torch is described only if somebody imported it already."""
    torch: Any = sys.modules.get("torch")
    return Hello(
        name=name,
        pid=os.getpid(),
        python=platform.python_version(),
        torch=str(getattr(torch, "__version__", "")) or None,
        cuda=getattr(getattr(torch, "version", None), "cuda", None),
        allocator=_allocator(torch),
        dynamic_vram=dynamic_vram,
        host=host,
        pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
    )


def _allocator(torch: Any) -> str | None:
    """torch's CUDA allocator backend: as torch says, or as the environment will make it."""
    try:
        return str(torch.cuda.get_allocator_backend())
    except Exception:  # noqa: BLE001
        # No torch, a CPU build, or one that is half imported.
        configured = ",".join(os.environ.get(name, "") for name in _ALLOCATOR_VARIABLES)
        return "cudaMallocAsync" if "backend:cudaMallocAsync" in configured else None
