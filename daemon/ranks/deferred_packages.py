"""Packages whose ``__init__`` imports far more than the modules that a rank wants of them.

Here it runs when a name of the package itself is first asked for, and not when one of its modules
is imported. No rank asks. xfuser's import each other in circles, so that asking them may fail.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DEFERRED = {
    "diffusers.models.autoencoders": "all VAEs there are; a rank knows one",
    "diffusers.models.transformers": "all transformers there are; a rank knows FLUX.1",
    "diffusers.models.unets": "all UNets there are; a VAE needs their blocks",
    "xfuser": "all pipelines, with those of diffusers; a rank has none",
    "xfuser.core": "attention for pipelines; a rank needs the groups",
    "xfuser.model_executor.layers": "layers of pipelines; a rank needs the exchange",
}


def defer_packages() -> None:
    """Have this process import them so, as long as they are not imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def import_diffusers_alone() -> None:
    """Import what ranks use of diffusers without transformers, which only its pipelines need.

    Ranks that encode text import transformers themselves, when they first do. It comes after
    `hide_unused_packages`: peft would want transformers. Raises what diffusers does.
    """
    with _absent("transformers"):
        importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
        importlib.import_module("diffusers.models.transformers.transformer_flux")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in DEFERRED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        # What is installed in another way is imported as ever.
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return None
        spec.loader = _DeferringLoader(spec.loader)
        return spec


class _DeferringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def fill(name: str) -> Any:
            # Python itself asks for such names, of modules that may not have them.
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            module.__dict__.pop("__getattr__", None)
            try:
                self._loader.exec_module(module)
            except BaseException:
                module.__dict__["__getattr__"] = fill
                raise
            return getattr(module, name)

        module.__dict__["__getattr__"] = fill

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextmanager
def _absent(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
