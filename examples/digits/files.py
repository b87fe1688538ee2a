"""Where the trained files lie."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"
TOKENIZERS = "tokenizers"
#: Role → file, below a folder of models.
PLACES = {
    "transformer": Path("diffusion_models", "digits-flux.safetensors"),
    "vae": Path("vae", "digits-ae.safetensors"),
    "clip_l": Path("text_encoders", "digits-clip_l.safetensors"),
    "t5": Path("text_encoders", "digits-t5xxl.safetensors"),
}
FILES = {role: MODELS / place for role, place in PLACES.items()}
