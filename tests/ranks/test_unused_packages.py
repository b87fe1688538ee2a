"""Ranks do not import what they never use, and do without it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from xdit_sidecar.daemon.ranks.unused_packages import UNUSED

PROGRAM = """
import sys
{first}
from xdit_sidecar.daemon.ranks.worker import load_engine
load_engine(gpu=False)
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel
print(*[name for name in {names} if sys.modules.get(name) is not None])
"""
HIDE = "from xdit_sidecar.daemon.ranks import unused_packages as u; u.hide_unused_packages()"


def imported(first: str) -> set[str]:
    """Those of them that a rank's start imports in a process that begins like this."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first, names=sorted(UNUSED))],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_a_rank_imports_none_of_them() -> None:
    assert imported(HIDE) == set()


def test_each_would_be_imported() -> None:
    assert imported("") == {name for name in UNUSED if importlib.util.find_spec(name)}
