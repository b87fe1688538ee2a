"""Tiny FLUX.1 files for a ComfyUI server: random, always the same, made once under `.cache/`.

Stock loaders take them where the test shim is installed. The transformer has four heads, so that
one, two or four ranks can share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import flux_files
import lora_files
import numpy as np
import torch
from PIL import Image
from ranks.components import component_files
from ranks.components.component_files import T5, Clip, SmallVae
from safetensors.torch import save_file

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "comfyui"

CLIP_SIZES = Clip(width=64, layers=2)
# ComfyUI's tokenizer has 32,100 tokens; the real file has room for a few more.
T5_SIZES = T5(width=64, heads=4, head_size=16, mlp_size=128, layers=2, vocabulary=32128)
VAE_SIZES = SmallVae()
FLUX_SIZES = flux_files.Flux(
    heads=4,
    head_size=16,
    double=2,
    single=2,
    context=T5_SIZES.width,
    pooled=CLIP_SIZES.width,
    channels=64,
    inputs=64,
)

# Names as loaders list them.
DIFFUSION_MODEL = "tiny-flux.safetensors"  # fp32
DIFFUSION_MODEL_BF16 = "tiny-flux-bf16.safetensors"
DIFFUSION_MODEL_OTHER = "tiny-flux-other.safetensors"  # fp32, the same sizes, other weights
CLIP_L = "tiny-clip_l.safetensors"  # fp16, as the next
T5XXL = "tiny-t5xxl.safetensors"
AUTOENCODER = "tiny-ae.safetensors"  # fp32
LORA = "tiny-lora.safetensors"  # with kohya's names, as the next
LORA_OTHER = "tiny-lora-other.safetensors"
LORA_DIFFUSERS = "tiny-lora-diffusers.safetensors"  # with diffusers' names: q, k and v apart
LORA_LOKR = "tiny-lokr.safetensors"  # no low-rank pairs, as the next
LORA_DORA = "tiny-dora.safetensors"
LORA_TEXT = "tiny-lora-text.safetensors"  # for the transformer and both text encoders
CHECKPOINT = "tiny-checkpoint.safetensors"  # all four parts, the same weights
CHECKPOINT_OTHER = "tiny-checkpoint-other.safetensors"  # the same sizes, other weights
PICTURE = "tiny-picture.png"  # 128 × 128, in the input folder
PICTURE_OTHER = "tiny-picture-other.png"  # 96 × 128
PICTURE_ODD = "tiny-picture-odd.png"  # 208 × 144: 13 × 9 tokens

Files = dict[str, dict[str, torch.Tensor]]


def install(base: Path) -> None:
    """Copy the files into models/ and input/ of a base directory; they are the caller's there."""
    shutil.copytree(_made(), base, dirs_exist_ok=True)


@cache
def _made() -> Path:
    target = _CACHE / f"tiny-{_fingerprint()}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "tiny.lock").open("w") as lock:  # pytest-xdist's workers
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=_CACHE) as name:
                _write(Path(name) / "ready")
                os.rename(Path(name) / "ready", target)
    return target


def _fingerprint() -> str:
    """Changes with whatever decides about the files' bytes."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in (component_files, flux_files, lora_files):
        digest.update(inspect.getsource(source).encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _write(base: Path) -> None:
    for name, tensors in _contents().items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    (base / "input").mkdir()
    _picture(0, 128, 128).save(base / "input" / PICTURE)
    _picture(1, 96, 128).save(base / "input" / PICTURE_OTHER)
    _picture(2, 208, 144).save(base / "input" / PICTURE_ODD)


def _contents() -> Files:
    parts, others = _parts(0), _parts(10)
    flux, clip, t5, vae = parts.values()
    encoders = {"clip_l.transformer.": CLIP_SIZES.shapes(), "t5xxl.transformer.": T5_SIZES.shapes()}
    lora = lora_files.bfl(FLUX_SIZES, seed=7) | lora_files.text_encoders(encoders, seed=8)
    return {
        f"diffusion_models/{DIFFUSION_MODEL}": flux,
        f"diffusion_models/{DIFFUSION_MODEL_BF16}": flux_files.store(flux, "BF16"),
        f"diffusion_models/{DIFFUSION_MODEL_OTHER}": flux_files.random_weights(FLUX_SIZES, seed=4),
        f"text_encoders/{CLIP_L}": clip,
        f"text_encoders/{T5XXL}": t5,
        f"vae/{AUTOENCODER}": vae,
        f"loras/{LORA}": lora_files.kohya(FLUX_SIZES, seed=5),
        f"loras/{LORA_OTHER}": lora_files.kohya(FLUX_SIZES, seed=6),
        f"loras/{LORA_DIFFUSERS}": lora_files.diffusers(FLUX_SIZES, seed=9),
        f"loras/{LORA_LOKR}": lora_files.lokr(FLUX_SIZES, seed=10),
        f"loras/{LORA_DORA}": lora_files.dora(FLUX_SIZES, seed=11),
        f"loras/{LORA_TEXT}": lora,
        f"checkpoints/{CHECKPOINT}": _whole(parts),
        f"checkpoints/{CHECKPOINT_OTHER}": _whole(others),
    }


def _parts(seed: int) -> Files:
    """What names begin with in a whole checkpoint → the part."""

    def encoder(sizes: Clip | T5, seed: int) -> dict[str, torch.Tensor]:
        return component_files.store(component_files.random_weights(sizes.shapes(), seed), "F16")

    return {
        "model.diffusion_model.": flux_files.random_weights(FLUX_SIZES, seed=seed),
        "text_encoders.clip_l.transformer.": encoder(CLIP_SIZES, seed + 1),
        "text_encoders.t5xxl.transformer.": encoder(T5_SIZES, seed + 2),
        "vae.": component_files.random_weights(VAE_SIZES.shapes(), seed=seed + 3),
    }


def _whole(parts: Files) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{key}": tensor for prefix, part in parts.items() for key, tensor in part.items()
    }


def _picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft colours that no symmetry maps to themselves."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
