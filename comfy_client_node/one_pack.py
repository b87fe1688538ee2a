"""One node pack per process: what happens where this one is there more than once.

Runs before anything else of the pack is imported, with the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from types import ModuleType

_log = logging.getLogger("xdit_sidecar.comfyui")

_INSTALLED = "xdit_sidecar"
_CLAIM = "xdit_sidecar:pack"  # in sys.modules: no module can be called that
_ADVICE = "then start ComfyUI again"


def claim(module: ModuleType) -> bool:
    """Whether this is the first pack that ComfyUI imports; the claim stays with the process.

    ComfyUI calls a pack's module by its folder's path: other imports of the package do not count.
    """
    if os.sep not in module.__name__:
        return True
    return sys.modules.setdefault(_CLAIM, module) is module


def check_first(module: ModuleType) -> None:
    """Raise ImportError, with what to do, if another copy has been imported as a pack before."""
    if claim(module):
        return
    first = sys.modules[_CLAIM]
    raise ImportError(
        f"the node pack xdit-sidecar is in custom_nodes twice: {_describe(first)} is used, "
        f"{_describe(module)} registers nothing. Remove one of these folders, {_ADVICE}"
    )


def choose_web(module: ModuleType, own: str) -> str | None:
    """WEB_DIRECTORY of a pack: ``own``, or that of the installed package that is used.

    The panel in the browser then is of the version that answers it. None where another pack was
    first, or browsers would run the same scripts twice.
    """
    if not claim(module):
        return None
    installed = _import_installed(module)
    web = getattr(installed, "WEB_DIRECTORY", None)
    if installed is None or web is None:
        return own
    return os.path.normpath(os.path.join(os.path.dirname(str(installed.__file__)), web))


def find_installed(module: ModuleType) -> ModuleType | None:
    """The package that pip has installed in ComfyUI's environment, to be used instead.

    None where there is none, or it is this very folder. Logs a warning if the versions differ.
    """
    installed = _import_installed(module)
    if installed is not None:
        where = _describe(installed)
        _log.info("xDiT: the nodes of %s, installed in ComfyUI's environment", where)
        _warn_of_difference(module, installed)
    return installed


def _import_installed(module: ModuleType) -> ModuleType | None:
    try:
        spec = importlib.util.find_spec(_INSTALLED)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or os.path.samefile(spec.origin, str(module.__file__)):
        return None
    installed = importlib.import_module(_INSTALLED)
    return installed if hasattr(installed, "comfy_entrypoint") else None


def _warn_of_difference(module: ModuleType, installed: ModuleType) -> None:
    own, other = _protocol(module), _protocol(installed)
    if own == other and module.__version__ == installed.__version__:
        return
    pip = f"{sys.executable} -m pip"
    text = (
        f"xDiT: two versions of xdit-sidecar: {_describe(module)}, and {_describe(installed)}, "
        "which is installed in ComfyUI's environment and is used (translations and example "
        "workflows are the first one's)"
    )
    if own[0] == other[0]:
        _log.warning("%s. To use the other one: %s uninstall %s", text, pip, "xdit-sidecar")
        return
    _log.warning(
        "%s. They speak different protocols, %s and %s: with a daemon of protocol %d.x, leave it "
        "so; with one of protocol %d.x, run `%s uninstall xdit-sidecar`, %s. `xdit-sidecar "
        "--version` tells the daemon's version",
        *(text, ".".join(map(str, own)), ".".join(map(str, other)), other[0], own[0], pip, _ADVICE),
    )


def _protocol(module: ModuleType) -> tuple[int, int]:
    """(major, minor) that the package of this name speaks."""
    version = importlib.import_module(f"{module.__name__}.protocol.version")
    major, minor = version.PROTOCOL_VERSION
    return major, minor


def _describe(module: ModuleType) -> str:
    return f"{os.path.dirname(str(module.__file__))} ({module.__version__})"
