"""Ranks do not import what they never use, and do without it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from flux_inputs import comfy_inputs
from ranks_scene import EXACT, SMALL, running_ranks
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
    there = {name for name in UNUSED if importlib.util.find_spec(name)}
    assert there - {"sklearn"} <= imported("")  # which some versions of transformers import


# Another package that is there, and imports scipy without asking whether it is.
NEEDS_SCIPY = """
import sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers" and sys.modules.get("scipy", ...) is None:
            raise RuntimeError("diffusers needs scipy here")

sys.meta_path.insert(0, Finder())
"""


def test_where_it_cannot_be_done_without_them_all_are_imported(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NEEDS_SCIPY)
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    with (
        running_ranks(tmp_path / "ranks", 1, environment=environment) as scene,
        scene.user() as user,
    ):
        inputs = comfy_inputs(SMALL)
        assert (user.forward(inputs) - scene.file("small").alone(inputs)).abs().max() <= EXACT
        assert scene.starts == 1
        log = scene.daemon.log
    assert log.count("cannot start without: diffusers needs scipy here") == 1
