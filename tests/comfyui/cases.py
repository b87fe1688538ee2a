"""What a stock workflow may ask of a sampler: the cases in which ours must give the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from comfyui import tiny_checkpoints, workflows
from comfyui.nodes_scene import QUICK, NodesScene
from comfyui.workflows import STOCK, Nodes, Settings, Workflow

SAME = 1e-4  # promised, after 8 steps in fp32

Builder = Callable[..., Workflow]
CASES: dict[str, tuple[Builder, Settings]] = {
    "euler": (workflows.text_to_image, QUICK),
    "odd size": (workflows.text_to_image, replace(QUICK, width=248, height=184)),
    "batch and cfg": (workflows.text_to_image, replace(QUICK, batch=2, cfg=2.5)),
    "dpmpp_2m karras": (
        workflows.text_to_image,
        replace(QUICK, sampler="dpmpp_2m", scheduler="karras"),
    ),
    "heun beta": (workflows.text_to_image, replace(QUICK, sampler="heun", scheduler="beta")),
    "uni_pc": (workflows.text_to_image, replace(QUICK, sampler="uni_pc", scheduler="normal")),
    "denoise": (workflows.image_to_image, replace(QUICK, denoise=0.6)),
    "mask": (workflows.masked, replace(QUICK, denoise=0.75)),
    "advanced": (workflows.advanced, QUICK),
    "custom": (workflows.custom, QUICK),
    "CFGGuider": (partial(workflows.custom, guider="CFGGuider"), replace(QUICK, cfg=2.0)),
    "LoRA": (workflows.text_to_image, replace(QUICK, loras=[(tiny_checkpoints.LORA, 0.8)])),
    "LoRA stack": (
        workflows.text_to_image,
        replace(QUICK, loras=[(tiny_checkpoints.LORA, 0.8), (tiny_checkpoints.LORA_OTHER, -0.5)]),
    ),
    "Kontext": (workflows.kontext, QUICK),
}


def difference(scene: NodesScene, build: Builder, settings: Settings, nodes: Nodes) -> float:
    """Between our nodes' latent and the stock ones'."""
    expected = scene.latent(build(STOCK, settings, save="stock", picture=False), "stock")
    found = scene.latent(build(nodes, settings, save="ours", picture=False), "ours")
    assert found.shape == expected.shape
    return float((found - expected).abs().max())
