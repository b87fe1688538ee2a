"""How ComfyUI describes a FLUX.1 to its own module."""

from __future__ import annotations

from flux_files import Flux


def module_arguments(flux: Flux) -> dict[str, object]:
    """Of ComfyUI's Flux module, whose channels are those of a latent."""
    side = flux.head_size * 7 // 32 * 2
    return {
        "image_model": "flux",
        "in_channels": flux.inputs // 4,
        "out_channels": flux.channels // 4,
        "vec_in_dim": flux.pooled,
        "context_in_dim": flux.context,
        "hidden_size": flux.width,
        "mlp_ratio": 4.0,
        "num_heads": flux.heads,
        "depth": flux.double,
        "depth_single_blocks": flux.single,
        "axes_dim": [flux.head_size - 2 * side, side, side],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": flux.guidance,
    }
