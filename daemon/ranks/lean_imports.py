"""What a rank imports at its start: the modules that it uses of diffusers and xfuser.

Left alone these import all models and pipelines there are, and whatever of other packages is
installed: half of the CPU seconds of a start, which is what a client waits for when a rank has
died.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Taken for not installed during the start.
UNUSED = {
    "accelerate": "device maps and offloading; a rank's weights are views of regions",
    "peft": "LoRA; a rank has branches of its own",
    "scipy": "losses and schedulers; a rank trains nothing and has schedules of its own",
    "sklearn": "measures of assisted generation; it imports scipy",
    "transformers": "pipelines; text encoders need some of it, which is imported afterwards",
    "trio": "requests to a hub beside other work; a rank makes none",
}
# Packages whose __init__ imports far more than the modules that are wanted of them.
DEFERRED = {
    "diffusers.models.autoencoders": "all VAEs there are; a rank knows one",
    "diffusers.models.transformers": "all transformers there are; a rank knows FLUX.1",
    "diffusers.models.unets": "all UNets there are; a VAE needs their blocks",
    "xfuser": "all pipelines, with those of diffusers; a rank has none",
    "xfuser.core": "attention for pipelines; a rank needs the groups",
    "xfuser.model_executor.layers": "layers of pipelines; a rank needs the exchange",
}


@contextmanager
def lean_imports(*, needed: str = "") -> Iterator[None]:
    """Import in here what a rank uses, in a process that has imported none of it yet.

    Unused packages but ``needed`` are taken for not installed meanwhile; afterwards whoever asks
    for one gets it, with all that it wants. The ``__init__`` of a deferred one waits until a name
    of the package itself is asked for. No rank asks; xfuser's import each other in circles, so that
    asking them may fail.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    hidden = [name for name in UNUSED if name not in sys.modules and name != needed]
    # None in sys.modules is Python's word for "not to be imported"; find_spec says so, too.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


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
