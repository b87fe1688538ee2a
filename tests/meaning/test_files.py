"""The files of the model that draws digits, and the script that made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import project
import pytest
from comfyui_checkout import comfyui
from digits.files import FILES, MODELS
from digits.words import DIGITS, PROMPTS, prompt
from digits_scene import tokenizers
from xdit_sidecar.daemon.models.flux_detection import detect_flux_file
from xdit_sidecar.daemon.tokenizers import Tokenizers
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

SCRIPT = project.ROOT / "examples" / "train_digits.py"


def shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    """What a file's header says."""
    with SafetensorsFile.open(path) as file:
        return {t.spec.name: (t.spec.dtype, t.spec.shape) for t in file.tensors}


def test_they_are_small_and_can_be_shared_by_four_ranks() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    with SafetensorsFile.open(FILES["transformer"]) as file:
        config = detect_flux_file(file)
        assert "CC BY 4.0" in file.metadata["about"]
    assert config.heads >= 4
    assert config.double_blocks + config.single_blocks >= 4


def test_their_tokenizers_give_comfyuis_numbers() -> None:
    own, real = tokenizers(), Tokenizers.open(comfyui())
    for text in ["", *(prompt(d, f) for d in range(len(DIGITS)) for f in range(len(PROMPTS)))]:
        assert own.clip_l(text) == real.clip_l(text), text
        assert own.t5(text) == real.t5(text), text


@pytest.mark.timeout(240)
def test_the_script_makes_them_again(tmp_path: Path) -> None:
    # Hardly any training: the same names, and what is not trained to the byte.
    made = tmp_path / "models"
    quick = ["--device", "cpu", "--autoencoder-steps", "2", "--transformer-steps", "2"]
    quick += ["--digits", "20", "--pictures", "20"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(made), *quick],
        capture_output=True,
        text=True,
        check=False,
    )
    # It says that nobody can read what so little training draws.
    assert done.returncode == 1, done.stderr
    assert "of 20 pictures are read rightly" in done.stdout, done.stderr
    for path in MODELS.rglob("*"):
        again = made / path.relative_to(MODELS)
        if path.parent.name in ("vae", "diffusion_models") and path.is_file():
            assert shapes(again) == shapes(path)
        elif path.is_file():
            assert again.read_bytes() == path.read_bytes(), path
