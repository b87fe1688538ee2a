"""The files of the model that draws digits, made again from nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import project
import torch
from digits.files import MODELS, PLACES

Figures = dict[str, object]

_SCRIPT = project.ROOT / "examples" / "train_digits.py"
_TRAINED = {PLACES["vae"], PLACES["transformer"]}


def digits_again(*options: str) -> Figures:
    """The whole training on the CPU: it draws digits again, and which files are the same bytes.

    Those that are trained are the same with the torch and the kind of CPU that made the files.
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, str(_SCRIPT), "--device", "cpu", "--out", directory, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        names = sorted(path.relative_to(MODELS) for path in MODELS.rglob("*") if path.is_file())
        same = {
            name: Path(directory, name).read_bytes() == (MODELS / name).read_bytes()
            for name in names
        }
    said = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"{said}\n{done.stderr}"
    assert all(same[name] for name in names if name not in _TRAINED), same
    return {
        "said": said,
        "torch": torch.__version__,
        "same_bytes": {str(name): found for name, found in same.items()},
    }


STAGES = {"digits-again": digits_again}
