"""Ranks import single modules without the packages around them."""

from __future__ import annotations

import json
import subprocess
import sys

from xdit_sidecar.daemon.ranks.deferred_packages import DEFERRED

# A module that nothing but the package's own __init__ imports.
BROUGHT_IN = {
    "diffusers.models.autoencoders": "autoencoder_kl_wan",
    "diffusers.models.transformers": "transformer_wan",
    "diffusers.models.unets": "unet_1d",
    "xfuser": "model_executor.pipelines",
    "xfuser.core": "long_ctx_attention",
    "xfuser.model_executor.layers": "conv",
}
START = """
import json, sys
from xdit_sidecar.daemon.ranks.deferred_packages import defer_packages, import_diffusers_alone
from xdit_sidecar.daemon.ranks.unused_packages import hide_unused_packages
hide_unused_packages()
if {lightly}:
    defer_packages()
    import_diffusers_alone()
from xdit_sidecar.daemon.ranks.worker import load_engine
load_engine(gpu=False)
names = {names!r}
def there():
    return [name for name in names if name in sys.modules]
at_start = there()
"""
# diffusers' packages are asked for names, in the way that its other modules do.
ASK = """
import diffusers
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models import autoencoders, transformers, unets
from transformers import CLIPTextModel, T5EncoderModel
assert not hasattr(unets, "nothing")
assert autoencoders.AutoencoderKL is AutoencoderKL is diffusers.AutoencoderKL
assert transformers.FluxTransformer2DModel is FluxTransformer2DModel
"""
NAMES = sorted([*(f"{name}.{module}" for name, module in BROUGHT_IN.items()), "transformers"])


def imported(*, lightly: bool) -> tuple[list[str], list[str]]:
    """Those of NAMES that a start imports, and those that are there after ASK."""
    program = START.format(lightly=lightly, names=NAMES) + ASK
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(json.dumps([at_start, there()]))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    at_start, afterwards = json.loads(done.stdout.splitlines()[-1])
    return at_start, afterwards


def test_a_start_imports_none_of_them_and_what_is_asked_for_is_there() -> None:
    at_start, afterwards = imported(lightly=True)
    assert at_start == []
    of_xfuser = {name for name in NAMES if name.startswith("xfuser")}
    assert set(afterwards) == set(NAMES) - of_xfuser


def test_each_would_be_imported() -> None:
    assert BROUGHT_IN.keys() == DEFERRED.keys()
    assert imported(lightly=False)[0] == NAMES
