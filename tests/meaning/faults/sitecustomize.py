"""TEST ONLY: what Python imports first where this folder is on PYTHONPATH. Breaks a rank.

``XDIT_TEST_FAULT`` names the fault. The module concerned is changed right after its import, so that
the code under test knows nothing of this.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PARALLEL = "xdit_sidecar.daemon.ranks.parallel"


def _skip_the_exchange(attention: Any) -> None:
    """Each rank attends to its own tokens alone: the all-to-all is missing."""

    for step in ("begin", "finish"):
        setattr(attention.SequenceExchange, step, getattr(attention.Exchange, step))
    attention.SequenceExchange.attend = attention.LocalExchange.attend
    attention.SequenceExchange.kernel = None  # chosen at each call


def _take_the_first_rows(splits: Any) -> None:
    """Every rank rotates its tokens by the positions of the first rank's."""
    original = splits.TokenSplit.take

    def take(self: Any, tokens: Any, dim: int) -> Any:
        # Only positions lie along the first dimension.
        split = splits.TokenSplit(self.length, self.ways, 0) if dim == 0 else self
        return original(split, tokens, dim)

    splits.TokenSplit.take = take


_FAULTS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "missing all-to-all": (f"{_PARALLEL}.attention", _skip_the_exchange),
    "wrong RoPE rows": (f"{_PARALLEL}.splits", _take_the_first_rows),
}


class _Breaker(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module as usual, and then breaks it."""

    def __init__(self, fault: str) -> None:
        self._name, self._break = _FAULTS[fault]
        self._original: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        self._original, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        self._original.exec_module(module)
        self._break(module)
        print(f"fault: {module.__name__} is broken on purpose", file=sys.stderr)


if _fault := os.environ.get("XDIT_TEST_FAULT"):
    sys.meta_path.insert(0, _Breaker(_fault))
