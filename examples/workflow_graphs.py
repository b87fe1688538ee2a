"""What the example workflows consist of: their nodes, links, groups and places on the canvas."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

#: Files that users of FLUX.1 have, by their folder in models/.
MODELS = {
    "diffusion_models": ["flux1-dev.safetensors"],
    "text_encoders": ["clip_l.safetensors", "t5xxl_fp16.safetensors"],
    "vae": ["ae.safetensors"],
    "loras": ["my_flux_lora.safetensors"],
}
PICTURE = "example.png"  # which ComfyUI has in its input folder

_PROMPT = "a lighthouse on a cliff at dusk, waves below, oil on canvas"
_SEED = 42
_TOP = 60  # of the first node in a column, below the group's title
_GAP = 40  # between nodes, titles included, and between groups
_MARGIN = 20  # of a group around its nodes
_COLUMN = 380

_START = (
    "Start the daemon first, in a terminal on this machine: `xdit-sidecar serve --ranks 1`, or as "
    "many ranks as you have GPUs. It keeps the models on the GPUs when ComfyUI stops."
)
_FILES = "Choose your own files in the three loaders, then write what you want to see"


@dataclass
class Graph:
    """A workflow whose columns are filled from left to right; each column is a group."""

    name: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[tuple[str, int, str, str]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    _left: int = 0
    _top: int = 0

    def column(self, title: str, color: str, width: int = _COLUMN) -> None:
        """Begin a group to the right of the last one."""
        if self.groups:
            self._left += self.groups[-1]["bounding"][2] + _GAP
        self._top = _TOP
        bounding = [self._left - _MARGIN, 0, width + 2 * _MARGIN, _TOP]
        self.groups.append({"title": title, "color": color, "bounding": bounding})

    def add(
        self, name: str, type_: str, height: int, /, *inputs: tuple[str, str, int], **widgets: Any
    ) -> None:
        """A node below the last; ``inputs`` are (input, name of a node, number of its output)."""
        bounding = self.groups[-1]["bounding"]
        self.nodes.append(
            {
                "name": name,
                "type": type_,
                "pos": [self._left, self._top],
                "size": [bounding[2] - 2 * _MARGIN, height],
                "widgets": widgets,
            }
        )
        self.links += [(node, output, name, taken) for taken, node, output in inputs]
        bounding[3] = self._top + height + _MARGIN
        self._top += height + 30 + _GAP

    def described(self) -> dict[str, Any]:
        """As `buildWorkflow` takes it."""
        lowest = max(group["bounding"][3] for group in self.groups)
        for group in self.groups:
            group["bounding"][3] = lowest
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"xdit-sidecar/{self.name}")),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "view": {"scale": 0.7, "offset": [120, 120]},
        }

    def size(self) -> tuple[int, int, int, int]:
        """(left, top, width, height) of all groups together."""
        left, top = self.groups[0]["bounding"][:2]
        last = self.groups[-1]["bounding"]
        return left, top, last[0] + last[2] - left, last[3]


def _loaders(graph: Graph, note: str, *, lora: bool = False) -> str:
    """The first column; the name of the node whose output is the MODEL."""
    graph.column("1  Load", "#3f789e")
    graph.add("note", "MarkdownNote", 200, text=note)
    graph.add(
        *("model", "XDiTUNetLoader", 180),
        unet_name="flux1-dev.safetensors",
        weight_dtype="default",
        ulysses="auto",
        ring="1",
        cfg_parallel="1",
        on_problem="stop",
    )
    graph.add(
        *("clip", "XDiTLoadDualCLIP", 110),
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp16.safetensors",
        device="default",
    )
    graph.add("vae", "XDiTLoadVAE", 60, vae_name="ae.safetensors")
    if not lora:
        return "model"
    graph.column("2  LoRA", "#a1309b", 320)
    graph.add(
        *("lora", "LoraLoaderModelOnly", 90, ("model", "model", 0)),
        lora_name="my_flux_lora.safetensors",
        strength_model=1.0,
    )
    return "lora"


def _describe(graph: Graph, number: int, prompt: str = _PROMPT) -> None:
    graph.column(f"{number}  Describe", "#3f9e4d")
    graph.add("prompt", "CLIPTextEncode", 160, ("clip", "clip", 0), text=prompt)
    graph.add("guidance", "FluxGuidance", 60, ("conditioning", "prompt", 0), guidance=3.5)
    graph.add("nothing", "ConditioningZeroOut", 30, ("conditioning", "prompt", 0))


def _empty_latent(graph: Graph) -> None:
    graph.add("latent", "EmptySD3LatentImage", 110, width=1024, height=1024, batch_size=1)


def _sample(graph: Graph, model: str, sampler: str = "KSampler", denoise: float = 1.0) -> None:
    inputs = [
        ("model", model, 0),
        ("positive", "guidance", 0),
        ("negative", "nothing", 0),
        ("latent_image", "latent", 0),
    ]
    own = sampler != "KSampler"
    if own:
        inputs.append(("vae", "vae", 0))
    graph.add(
        *("sampler", sampler, 290 if own else 270),
        *inputs,
        seed=_SEED,
        control_after_generate="randomize",
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=denoise,
    )


def _save(graph: Graph, number: int, prefix: str, *, decode: bool = True) -> None:
    graph.column(f"{number}  Save", "#b06634")
    source = ("images", "sampler", 1)
    if decode:
        graph.add("decode", "XDiTVAEDecode", 60, ("samples", "sampler", 0), ("vae", "vae", 0))
        source = ("images", "decode", 0)
    graph.add("save", "SaveImage", 280, source, filename_prefix=f"xdit/{prefix}")


def text_to_image() -> Graph:
    """The stock KSampler on the daemon's model."""
    graph = Graph("flux_text_to_image")
    model = _loaders(graph, f"{_START}\n\n{_FILES} and press Run.")
    _describe(graph, 2)
    graph.column("3  Sample", "#8a8a3a")
    _empty_latent(graph)
    _sample(graph, model)
    _save(graph, 4, "text_to_image")
    return graph


def image_to_image() -> Graph:
    """A picture, scaled to a million pixels, encoded and partly drawn anew by the daemon."""
    graph = Graph("flux_image_to_image")
    note = f"{_START}\n\n{_FILES}, choose a picture, and set denoise: lower keeps more of it."
    model = _loaders(graph, note)
    _describe(graph, 2)
    graph.column("3  Picture", "#3a8a8a", 320)
    graph.add("picture", "LoadImage", 310, image=PICTURE)
    graph.add(
        *("scaled", "ImageScaleToTotalPixels", 90, ("image", "picture", 0)),
        upscale_method="lanczos",
        megapixels=1.0,
    )
    graph.add("latent", "XDiTVAEEncode", 60, ("pixels", "scaled", 0), ("vae", "vae", 0))
    graph.column("4  Sample", "#8a8a3a")
    _sample(graph, model, denoise=0.75)
    _save(graph, 5, "image_to_image")
    return graph


def lora() -> Graph:
    """A LoRA by the stock loader; the ranks apply it beside the shared weights."""
    graph = Graph("flux_lora")
    note = f"{_START}\n\n{_FILES}, choose your LoRA and its strength. Several go one after another."
    model = _loaders(graph, note, lora=True)
    _describe(graph, 3)
    graph.column("4  Sample", "#8a8a3a")
    _empty_latent(graph)
    _sample(graph, model)
    _save(graph, 5, "lora")
    return graph


def xdit_ksampler() -> Graph:
    """All steps and the decoding in the daemon."""
    graph = Graph("flux_xdit_ksampler")
    note = (
        f"{_START}\n\n{_FILES}. XDiT KSampler has all steps and the decoding done by the daemon, "
        "with euler, ddim, heun or dpmpp_2m; the node tells which way it took."
    )
    model = _loaders(graph, note)
    _describe(graph, 2)
    graph.column("3  Sample and decode", "#8a8a3a")
    _empty_latent(graph)
    _sample(graph, model, "XDiTKSampler")
    _save(graph, 4, "xdit_ksampler", decode=False)
    return graph


ALL = (text_to_image, image_to_image, lora, xdit_ksampler)
