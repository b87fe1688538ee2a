"""Inputs of one FLUX.1 forward, as ComfyUI gives them and as diffusers takes them."""

from __future__ import annotations

import torch
from flux_files import Flux

Inputs = dict[str, torch.Tensor]


def comfy_inputs(
    flux: Flux,
    *,
    height: int = 12,
    width: int = 8,
    text: int = 7,
    batch: int = 2,
    reference: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> Inputs:
    """x [batch, channels, height, width] in latent pixels, timestep and guidance [batch] in fp32,
    context [batch, text, width], y [batch, pooled], and perhaps one Kontext reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {
        "x": normal(batch, flux.inputs // 4, height, width),
        "timestep": torch.linspace(0.73, 0.21, batch),
        "context": normal(batch, text, flux.context),
        "y": normal(batch, flux.pooled),
    }
    if flux.guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    if reference is not None:
        inputs["ref_latent"] = normal(batch, flux.inputs // 4, *reference)
    return inputs


def pack(latent: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] to tokens [batch, height·width/4, channels·4]."""
    batch, channels, height, width = latent.shape
    cells = latent.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def ids(latent: torch.Tensor, index: int) -> torch.Tensor:
    """(index, row, column) of each token."""
    rows, columns = latent.shape[-2] // 2, latent.shape[-1] // 2
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.full((len(grid), 1), index), grid], 1).float()


def run_diffusers(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """diffusers' forward; a latent [batch, channels, height, width] like ComfyUI's."""
    x = inputs["x"]
    latents = [x, *([inputs["ref_latent"]] if "ref_latent" in inputs else [])]
    with torch.no_grad():
        (tokens,) = model(
            hidden_states=torch.cat([pack(latent) for latent in latents], 1),
            encoder_hidden_states=inputs["context"],
            pooled_projections=inputs["y"],
            timestep=inputs["timestep"],
            guidance=inputs.get("guidance"),
            img_ids=torch.cat([ids(latent, index) for index, latent in enumerate(latents)]),
            txt_ids=torch.zeros(inputs["context"].shape[1], 3),
            return_dict=False,
        )
    batch, _, height, width = x.shape
    tokens = tokens[:, : height * width // 4]
    cells = tokens.reshape(batch, height // 2, width // 2, tokens.shape[-1] // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)
