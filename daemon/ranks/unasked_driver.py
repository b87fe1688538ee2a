"""Imports that do not ask CUDA's driver for anything, so that ranks can be forked afterwards.

CUDA cannot be used in a process that was forked from one that has initialised it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_DEVICES = "/dev/nvidia"


@contextmanager
def unasked_driver() -> Iterator[None]:
    """Whoever asks torch in here whether there is an accelerator is told that there is none.

    torch would ask the driver, and packages that hear of a GPU go on to ask its name.
    """
    asked: list[Any] = [torch.cuda]
    if hasattr(torch, "accelerator"):  # from torch 2.6 on
        asked.append(torch.accelerator)
    originals = [module.is_available for module in asked]
    for module in asked:
        module.is_available = lambda: False
    try:
        yield
    finally:
        for module, original in zip(asked, originals, strict=True):
            module.is_available = original


def check_unasked() -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith(_DEVICES):
            raise RuntimeError(
                "a package that ranks import has initialised CUDA while it was imported, so that "
                "no rank could use it; which is known to work is in constraints.txt"
            )
