"""What Python imports first where `make test` has put this folder on PYTHONPATH.

Coverage slows down every line of Python, of other packages, too: a rank spends a third of its start
on the imports of torch, diffusers and xfuser being traced. Here their modules are executed without.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Each takes from half a second to several.
SLOW = {"diffusers", "flash_attn", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers"}
SLOW |= {"distvae", "huggingface_hub", "PIL", "xfuser", "yunchang"}


class _Untraced:
    """Finds the modules of SLOW as usual, while something traces, for a loader that pauses it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in SLOW or sys.gettrace() is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            super().exec_module(module)
        finally:
            sys.settrace(trace)


sys.meta_path.insert(0, _Untraced())
