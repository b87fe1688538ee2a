"""Stands in for PyAV: ComfyUI imports it for videos and sounds, of which no test has any.

Every name in it and in its submodules is an empty class, whose names are such classes again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence


class _Names(type):
    def __getattr__(cls, name: str) -> _Names:
        return _make(cls, name)


def _make(owner: object, name: str) -> _Names:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _Names(name, (), {})
    setattr(owner, name, made)
    return made


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = lambda name: _make(module, name)  # type: ignore[method-assign]


def __getattr__(name: str) -> _Names:
    return _make(sys.modules[__name__], name)


sys.meta_path.append(_Submodules())
