"""Compiles the fake CUDA driver that stands in for libcuda where there is no GPU."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_CACHE = _HERE.parents[1] / ".cache"
_FLAGS = ("-shared", "-fPIC", "-pthread", "-O1", "-Wall", "-Wextra", "-Werror")


def fake_libcuda() -> str:
    """Path of the compiled fake, for ``XDIT_SIDECAR_LIBCUDA``; built if its source is new.

    Raises ``RuntimeError`` if there is no C compiler, or if it fails.
    """
    sources = sorted(_HERE.glob("*.c"))
    digest = hashlib.sha256(" ".join((*_FLAGS, platform.machine())).encode())
    for file in (*sources, *sorted(_HERE.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    library = _CACHE / f"fake_cuda-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        _CACHE.mkdir(exist_ok=True)
        _compile(sources, library)
    return str(library)


def _compile(sources: list[Path], library: Path) -> None:
    # Several pytest-xdist workers may build at once: each its own file, and the last rename wins.
    descriptor, temporary = tempfile.mkstemp(prefix=library.stem, suffix=".tmp", dir=library.parent)
    os.close(descriptor)
    try:
        command = [*_compiler(), *_FLAGS, "-o", temporary, *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the fake CUDA driver does not compile: {' '.join(command)}\n{done.stderr}"
            )
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _compiler() -> list[str]:
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if find_spec("ziglang"):
        # zig's default checks would need a runtime library in the process that loads the fake.
        return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=undefined"]
    raise RuntimeError(
        "the fake CUDA driver needs a C compiler: install cc, gcc or clang, "
        "or `pip install ziglang` into this environment"
    )
