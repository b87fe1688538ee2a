"""Where a part that is missing comes from, for the sentence that says so."""

from __future__ import annotations

# Role → the node of ComfyUI that hands it over.
NODES = {
    "transformer": "XDiT UNet Loader",
    "vae": "Load VAE (xDiT)",
    "clip_l": "Load Dual CLIP (xDiT)",
    "t5": "Load Dual CLIP (xDiT)",
}


def name_source(role: str) -> str:
    """What to do for a component of this role, to follow a colon."""
    node = f"the node {NODES[role]!r}" if role in NODES else "its loader node"
    return f"hand it over with {node} in ComfyUI, or with `xdit-sidecar load FILE`"
