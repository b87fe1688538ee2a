"""Triton for tests on machines without a GPU, under `.cache/triton/`: downloaded once.

Its interpreter runs kernels on the CPU. It is not installed where the tests run: a build of torch
for CPUs comes without it, and xfuser has to be able to do so as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from provided_once import provide_once

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "triton"
_WANTED = "triton==3.6.0"
_SECONDS = 90


def triton_folder() -> Path:
    """What to have in PYTHONPATH. Skips the test, saying why, if it cannot be had."""
    found = _provide()
    if isinstance(found, str):
        pytest.skip(f"KERNELS NOT TESTED: {_WANTED} cannot be downloaded: {found}")
    return found


@cache  # a failure, too: without a network each attempt takes long
def _provide() -> Path | str:
    version = _WANTED.partition("==")[2]
    return provide_once(_CACHE / f"{version}-{sys.implementation.cache_tag}", _install)


def _install(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
                *("--disable-pip-version-check", "--target", f"{folder}/ready", _WANTED),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        os.rename(f"{folder}/ready", target)
