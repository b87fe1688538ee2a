"""A rank's start imports what it uses, and what it leaves out is there for those who ask later."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from flux_inputs import comfy_inputs
from ranks_scene import EXACT, SMALL, running_ranks
from xdit_sidecar.daemon.ranks.lean_imports import DEFERRED, UNUSED

# For each deferred package a module that nothing but its own __init__ imports.
BROUGHT_IN = {
    "diffusers.models.autoencoders": "autoencoder_kl_wan",
    "diffusers.models.transformers": "transformer_wan",
    "diffusers.models.unets": "unet_1d",
    "xfuser": "model_executor.pipelines",
    "xfuser.core": "long_ctx_attention",
    "xfuser.model_executor.layers": "conv",
}
OF_DEFERRED = {f"{name}.{module}" for name, module in BROUGHT_IN.items()}
START = """
import json, sys
from contextlib import nullcontext
from xdit_sidecar.daemon.ranks.lean_imports import lean_imports
with {around}:
    from xdit_sidecar.daemon.ranks.worker import load_engine, load_text_encoders
    load_engine("cpu")
def there():
    return [name for name in {names} if sys.modules.get(name) is not None]
at_start = there()
with {around_texts}:
    load_text_encoders()
at_start += there()
"""
# Text encoders are asked for, and diffusers' packages in the way that its other modules do.
ASK = """
import diffusers
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models import autoencoders, transformers, unets
from transformers import CLIPTextModel, T5EncoderModel
assert not hasattr(unets, "nothing")
assert autoencoders.AutoencoderKL is AutoencoderKL is diffusers.AutoencoderKL
assert transformers.FluxTransformer2DModel is FluxTransformer2DModel
"""


def imported(around: str) -> tuple[set[str], set[str]]:
    """What a start in ``around`` imports of all these, and what is there after ASK."""
    around_texts = around.replace("lean_imports()", 'lean_imports(needed="transformers")')
    program = START.format(
        around=around, around_texts=around_texts, names=sorted(UNUSED.keys() | OF_DEFERRED)
    )
    program += ASK
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(json.dumps([at_start, there()]))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    at_start, afterwards = json.loads(done.stdout.splitlines()[-1])
    return set(at_start), set(afterwards)


def test_a_start_imports_none_of_them_and_what_is_asked_for_is_there() -> None:
    at_start, afterwards = imported("lean_imports()")
    assert at_start == {"transformers"}  # for text encoders, after the rest
    of_xfuser = {name for name in OF_DEFERRED if name.startswith("xfuser")}
    assert (OF_DEFERRED - of_xfuser) | {"transformers"} <= afterwards


def test_each_would_be_imported() -> None:
    assert BROUGHT_IN.keys() == DEFERRED.keys()
    installed = {name for name in UNUSED if importlib.util.find_spec(name)}
    # The last two: by some versions of those who use them.
    assert (installed | OF_DEFERRED) - {"sklearn", "trio"} <= imported("nullcontext()")[0]


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
