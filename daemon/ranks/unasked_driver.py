"""Imports that do not ask CUDA's driver for anything, so that ranks can be forked afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unasked_driver() -> Iterator[None]:
    """Whoever asks torch in here whether there is CUDA is told that there is none.

    Packages that believe it go on to ask the name of the GPU; CUDA cannot be used in a process
    that is forked from one that has asked the driver.
    """
    original = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = original
