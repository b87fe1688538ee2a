"""A process that is to run ComfyUI's own code: on the CPU, without what FLUX.1 does not need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# ComfyUI imports these for other models, samplers and schedulers than the ones compared here.
UNUSED = ("torchvision", "torchaudio", "torchsde", "scipy")


def enter(comfyui: str) -> None:
    """From here on ``import comfy`` finds the checkout in the folder ``comfyui``."""
    sys.path.insert(0, comfyui)
    sys.argv[1:] = []
    missing = [name for name in UNUSED if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Hollow(missing))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before model_management looks for a GPU


class _HollowModule(ModuleType):
    """Has every name that is asked of it; what is behind them does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Hollow(MetaPathFinder, Loader):
    """Finds hollow modules for the given packages and all below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        known = name.partition(".")[0] in self._names
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _HollowModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
