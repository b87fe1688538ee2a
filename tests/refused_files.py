"""Files that `load` refuses: each function writes one and returns what is said about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import flux_files
import pytest
import torch
from command_scene import whole_checkpoint
from picture_scene import TINY
from safetensors.torch import save_file
from weights_files import with_header


def truncated(path: Path) -> str:
    TINY.write(path.parent)
    path.write_bytes((path.parent / "tiny-vae.safetensors").read_bytes()[:-9])
    return "is truncated: tensor "


def gguf(path: Path) -> str:
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    return "is a GGUF file: only .safetensors files are supported"


def pickled(path: Path) -> str:
    path.write_bytes(b"\x80\x02}q\0" + bytes(64))
    return "is a pickled checkpoint (.pt, .ckpt or .bin), which could run code"


def renamed_text(path: Path) -> str:
    path.write_text("not the weights that you are looking for\n" * 9)
    return "is no safetensors file (it begins with the bytes "


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "is empty: only .safetensors files are supported"


def missing(path: Path) -> str:
    return "does not exist: check the path"


def directory(path: Path) -> str:
    path.mkdir()
    return "is a directory: name one .safetensors file in it"


def unreadable(path: Path) -> str:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path.write_bytes(with_header({}))
    path.chmod(0)
    return "may not be read by uid "


def without_tensors(path: Path) -> str:
    path.write_bytes(with_header({}))
    return "is no diffusion model that is known here (its tensors: none)"


def sdxl(path: Path) -> str:
    names = ("input_blocks.0.0.weight", "label_emb.0.0.weight", "out.2.weight")
    flux_files.write_hollow(path, {f"model.diffusion_model.{n}": ("F16", (4, 4)) for n in names})
    return "is SDXL; supported are FLUX.1 transformers"


def sd_vae(path: Path) -> str:
    vae = TINY.tensors()["vae"]
    vae["decoder.conv_in.weight"] = vae["decoder.conv_in.weight"][:, :4].contiguous()
    save_file(vae, path)
    return "is a VAE of 4 latent channels without quant_conv; supported are VAEs of FLUX.1's kind"


def vae_with_a_hole(path: Path) -> str:
    vae = TINY.tensors()["vae"]
    del vae["decoder.conv_out.bias"]
    save_file(vae, path)
    return "is a VAE of FLUX.1's kind, but incomplete: without decoder.conv_out.bias; copy or"


def transformer_with_a_hole(path: Path) -> str:
    tensors = TINY.tensors()["transformer"]
    del tensors["double_blocks.0.img_mlp.2.bias"]
    save_file(tensors, path)
    return "is an incomplete FLUX.1 transformer: double_blocks.0.img_mlp.2.bias is missing"


def large_clip(path: Path) -> str:
    clip = TINY.tensors()["clip_l"]
    layer = {n: t for n, t in clip.items() if ".layers.0." in n}
    for number in range(1, 24):
        clip |= {n.replace(".0.", f".{number}.", 1): t.clone() for n, t in layer.items()}
    save_file(clip, path)
    return "is CLIP-H or CLIP-G (24 layers), not CLIP-L; supported are FLUX.1's text encoders"


def lora_of_another_kind(path: Path) -> str:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(2, 2)}, path)
    return f"cannot run beside FLUX.1: {name}.lokr_w1 (LoKr), "


def checkpoint_of_another_model(path: Path) -> str:
    # Its VAE and text encoders could be used; its transformer was meant as well.
    whole_checkpoint(path, transformer={"joint_blocks.0.x_block.mlp.fc1.weight": torch.ones(2, 2)})
    return "is Stable Diffusion 3; supported are FLUX.1 transformers"


def checkpoint_with_a_broken_part(path: Path) -> str:
    vae = TINY.tensors()["vae"]
    del vae["decoder.conv_out.bias"]
    whole_checkpoint(path, vae=vae)
    return "without decoder.conv_out.bias"


REFUSED: list[Callable[[Path], str]] = [
    *(truncated, gguf, pickled, renamed_text, empty, missing, directory, unreadable),
    *(without_tensors, sdxl, sd_vae, vae_with_a_hole, transformer_with_a_hole, large_clip),
    *(lora_of_another_kind, checkpoint_of_another_model, checkpoint_with_a_broken_part),
]
