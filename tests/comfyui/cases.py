"""What a stock workflow may ask of a sampler: the cases in which ours must give the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from comfyui import tiny_checkpoints, workflows
from comfyui.listener import Listener
from comfyui.nodes_scene import QUICK, REMOTE, NodesScene, sampling
from comfyui.workflows import STOCK, Nodes, Settings, Workflow

SAME = 1e-4  # promised, after 8 steps in fp32

Builder = Callable[..., Workflow]
CASES: dict[str, tuple[Builder, Settings]] = {
    "euler": (workflows.text_to_image, QUICK),
    "padded": (workflows.text_to_image, replace(QUICK, width=248, height=184)),
    # 17 × 13 tokens of the picture: no degree divides them.
    "odd size": (workflows.text_to_image, replace(QUICK, width=272, height=208)),
    "odd size and cfg": (workflows.text_to_image, replace(QUICK, width=272, height=208, cfg=2.0)),
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
    "diffusers LoRA": (
        workflows.text_to_image,
        replace(
            QUICK, loras=[(tiny_checkpoints.LORA_DIFFUSERS, 0.7), (tiny_checkpoints.LORA, 0.7)]
        ),
    ),
    "Kontext": (workflows.kontext, QUICK),
    "odd Kontext": (
        partial(workflows.kontext, references=[tiny_checkpoints.PICTURE_ODD]),
        replace(QUICK, width=272, height=208),
    ),
}
#: With a sampler that XDiT KSampler can replace → whether the daemon then does the whole run.
WHOLE = {
    **dict.fromkeys(
        ("euler", "padded", "odd size", "odd size and cfg", "batch and cfg", "dpmpp_2m karras"),
        True,
    ),
    **dict.fromkeys(("heun beta", "denoise", "mask", "LoRA", "LoRA stack", "diffusers LoRA"), True),
    **dict.fromkeys(("uni_pc", "Kontext", "odd Kontext"), False),
}
ALL_THERE, HERE = "all steps run in the daemon", "ComfyUI samples, because"


def difference(scene: NodesScene, build: Builder, settings: Settings, nodes: Nodes) -> float:
    """Between our nodes' latent and the stock ones'."""
    return _compare(scene, build, settings, build(nodes, settings, save="ours", picture=False))


def sampler_difference(scene: NodesScene, name: str) -> tuple[float, str]:
    """As `difference` of a case of `WHOLE`, with our KSampler, too; and what the node says."""
    build, settings = CASES[name]
    workflow = sampling(build(REMOTE, settings, save="ours", picture=False))
    with scene.server.listen() as listener:
        found = _compare(scene, build, settings, workflow, listener)
        told = [e.data["text"] for e in listener.named("text") if e.data["node"] == "sampler"]
    return found, " ".join(told)


def _compare(
    scene: NodesScene,
    build: Builder,
    settings: Settings,
    ours: Workflow,
    listener: Listener | None = None,
) -> float:
    stock = build(STOCK, settings, save="stock", picture=False)
    key = repr(stock)
    if key not in scene.expected:
        scene.expected[key] = scene.latent(stock, "stock")
    scene.server.run(ours, listener)
    found = scene.server.tensors("ours")["samples"]
    assert found.shape == scene.expected[key].shape
    return float((found - scene.expected[key]).abs().max())
