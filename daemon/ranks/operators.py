"""What compiled code calls and does not look into: operators of torch, ``xdit_sidecar::…``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def define_operator(
    signature: str, run: Callable[..., Any], describe: Callable[..., Any] | None = None
) -> None:
    """Make ``torch.ops.xdit_sidecar.<name>`` of ``run``; once for each name.

    ``signature``: as torch writes them, ``name(Tensor(a!) changed, Tensor? other) -> Tensor``.
    ``describe`` gives, for tensors without data, tensors like the results; None where there are
    none.
    """
    library: Any = torch.library
    name = "xdit_sidecar::" + signature.partition("(")[0]
    library.define(name, signature[signature.index("(") :])
    library.impl(name, "CompositeExplicitAutograd", run)
    library.register_fake(name, describe or _nothing)


def _nothing(*arguments: Any) -> None:
    return None
