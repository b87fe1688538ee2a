"""What ranks do in tests of the parallel VAE."""

from __future__ import annotations

from typing import Any

import component_files
import torch
import torch.distributed as dist
from rank_tasks import Place
from xdit_sidecar.daemon.models.vae_detection import detect_vae
from xdit_sidecar.daemon.ranks.parallel import process_group
from xdit_sidecar.daemon.ranks.vae import model as vae_model
from xdit_sidecar.daemon.ranks.vae.model import build_vae
from xdit_sidecar.daemon.ranks.vae.parallel_decode import ParallelDecoder


def decode_together(place: Place, *, heights: list[int]) -> dict[str, Any]:
    """Errors of the ranks' pictures: per height, in tiles, and in bf16 beside those of one rank."""
    place.join()
    small = component_files.SmallVae(multipliers=(1, 1, 2))
    weights = component_files.random_weights(small.shapes())
    config = detect_vae(component_files.specs_of(weights), "random")
    exact = build_vae(config, weights, torch.float32)
    rough = build_vae(config, weights, torch.bfloat16)
    state = torch.random.get_rng_state()
    together, rough_together = ParallelDecoder(exact), ParallelDecoder(rough, dist.group.WORLD)
    unmoved = torch.equal(torch.random.get_rng_state(), state)
    generator = torch.Generator().manual_seed(3)
    errors = {}
    for height in heights:
        latent = torch.randn((2, 16, height, 5), generator=generator)
        picture = together.decode(latent)
        assert picture.shape == (2, small.ratio * height, small.ratio * 5, 3)
        errors[height] = float((picture - exact.decode(latent)).abs().max())
    latent = torch.randn((1, 16, 6, 5), generator=generator)
    right = exact.decode(latent)
    alone, shared = (
        float((decoder.decode(latent) - right).square().mean().sqrt())
        for decoder in (rough, rough_together)
    )
    vae_model.TILE, vae_model.TILE_OVERLAP = 8, 2
    latent = torch.randn((1, 16, 10, 5), generator=generator)
    tiled = together.decode(latent, tiles=True) - exact.decode(latent, tiles=True)
    decoders = [decoder._decoder for decoder in (together, rough_together)]
    parameters = [p for decoder in decoders if decoder is not None for p in decoder.parameters()]
    process_group.leave()
    return {
        "errors": list(errors.values()),
        "tiled": float(tiled.abs().max()),
        "bf16 alone": alone,
        "bf16 together": shared,
        "copies": component_files.copies(parameters, weights.values()),
        "parameters": len(parameters),
        "unmoved": unmoved,
    }


TASKS = {"decode_together": decode_together}
