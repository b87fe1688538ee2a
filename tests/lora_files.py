"""Random LoRA files for tiny FLUX.1 models, in the layouts that trainers write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flux_files import Flux, shapes_of

Tensors = dict[str, torch.Tensor]
RANK = 3


def weights_of(flux: Flux) -> dict[str, tuple[int, ...]]:
    """Every linear layer of the BFL model, without ``.weight`` → (rows, columns)."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes_of(flux).items()
        if name.endswith(".weight")
    }


def pair(
    rows: int, columns: int, generator: torch.Generator, rank: int = RANK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) whose product is about as large as the weights of `flux_files`."""
    down = torch.randn(rank, columns, generator=generator) / columns**0.5
    up = torch.randn(rows, rank, generator=generator) / rank**0.5
    return down, 0.3 * up


def neutral(flux: Flux, seed: int = 0, alpha: float | None = None) -> Tensors:
    """A pair for each weight of the model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in weights_of(flux).items():
        tensors[f"{name}.down"], tensors[f"{name}.up"] = pair(rows, columns, generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(flux: Flux, seed: int = 0, alpha: float = 2.0) -> Tensors:
    """``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` and so on."""
    parts = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    tensors = {}
    for name, tensor in neutral(flux, seed, alpha).items():
        module, _, part = name.rpartition(".")
        tensors[f"lora_unet_{module.replace('.', '_')}.{parts[part]}"] = tensor
    return tensors


def bfl(flux: Flux, seed: int = 0) -> Tensors:
    """``diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`` and so on."""
    parts = {"down": "lora_A.weight", "up": "lora_B.weight"}
    tensors = {}
    for name, tensor in neutral(flux, seed).items():
        module, _, part = name.rpartition(".")
        tensors[f"diffusion_model.{module}.{parts[part]}"] = tensor
    return tensors


def text_encoders(encoders: Mapping[str, Mapping[str, tuple[int, ...]]], seed: int = 0) -> Tensors:
    """A pair for each linear layer of text encoders: ComfyUI's prefix → a file's names, shapes.

    ``text_encoders.clip_l.transformer.text_model.….lora_A.weight`` and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix, shapes in encoders.items():
        for name, shape in shapes.items():
            if len(shape) != 2 or not any(part in name for part in ("ttention.", "attn.", "mlp.")):
                continue
            if "bias" in name:
                continue
            module = f"text_encoders.{prefix}{name.removesuffix('.weight')}"
            down, up = pair(*shape, generator)
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
    return tensors


def diffusers_modules(flux: Flux) -> dict[str, tuple[int, int]]:
    """Every linear layer of diffusers' model → (rows, columns)."""
    width = flux.width
    modules = {
        "x_embedder": (width, flux.inputs),
        "context_embedder": (width, flux.context),
        "norm_out.linear": (2 * width, width),
        "proj_out": (flux.channels, width),
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.guidance_embedder.linear_2": (width, width),
        "time_text_embed.text_embedder.linear_1": (width, flux.pooled),
    }
    square = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    for block in range(flux.double):
        at = f"transformer_blocks.{block}"
        modules |= {f"{at}.attn.{name}": (width, width) for name in square}
        modules[f"{at}.attn.to_out.0"] = modules[f"{at}.attn.to_add_out"] = (width, width)
        for norm in ("norm1", "norm1_context"):
            modules[f"{at}.{norm}.linear"] = (6 * width, width)
        for mlp in ("ff", "ff_context"):
            modules[f"{at}.{mlp}.net.0.proj"] = (4 * width, width)
            modules[f"{at}.{mlp}.net.2"] = (width, 4 * width)
    for block in range(flux.single):
        at = f"single_transformer_blocks.{block}"
        modules |= {f"{at}.attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
        modules[f"{at}.proj_mlp"] = (4 * width, width)
        modules[f"{at}.proj_out"] = (width, 5 * width)
        modules[f"{at}.norm.linear"] = (3 * width, width)
    return modules


def diffusers(flux: Flux, seed: int = 0, prefix: str = "transformer.") -> Tensors:
    """``transformer.transformer_blocks.0.attn.to_q.lora_A.weight`` and so on."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in diffusers_modules(flux).items():
        down, up = pair(rows, columns, generator)
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
    return tensors


def lokr(flux: Flux, seed: int = 0) -> Tensors:
    """Kronecker products for the first block: what is no low-rank pair."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("img_attn_proj", "txt_attn_proj"):
        module = f"lora_unet_double_blocks_0_{name}"
        side = flux.width // 4
        tensors[f"{module}.lokr_w1"] = torch.randn(4, 4, generator=generator)
        tensors[f"{module}.lokr_w2"] = torch.randn(side, side, generator=generator) / side
    return tensors


def dora(flux: Flux, seed: int = 0) -> Tensors:
    """As `kohya`, with a magnitude for each row of the first block's projections."""
    tensors = kohya(flux, seed)
    for name in ("img_attn_proj", "txt_attn_proj"):
        tensors[f"lora_unet_double_blocks_0_{name}.dora_scale"] = torch.full((flux.width, 1), 0.8)
    return tensors
