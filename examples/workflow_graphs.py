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
_TITLE = 30  # height of a node's title, above its place
_GAP = 40  # between nodes, and between groups
_MARGIN = 20  # of a group around its nodes
_COLUMN = 420  # width of a group

_START = (
    "Start the daemon first, in a terminal on this machine: `xdit-sidecar serve`. It keeps the "
    "models on the GPUs when ComfyUI stops."
)
_FILES = "Choose your own files in the three loaders, then write what you want to see"


@dataclass
class Graph:
    """A workflow in columns from left to right, each of groups one below the other."""

    name: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[tuple[str, int, str, str]] = field(default_factory=list)
    columns: list[list[dict[str, Any]]] = field(default_factory=list)
    _top: int = 0

    def column(self, title: str, color: str) -> None:
        """Begin a column, and a group in it."""
        self.columns.append([])
        self.group(title, color)

    def group(self, title: str, color: str) -> None:
        """Begin a group below the last one of the column."""
        column = self.columns[-1]
        top = _bottom(column[-1]) + _GAP if column else 0
        self._top = top + _TOP
        left = (len(self.columns) - 1) * (_COLUMN + _GAP)
        number = 1 + sum(map(len, self.columns))
        bounding = [left, top, _COLUMN, _TOP]
        column.append({"title": f"{number}  {title}", "color": color, "bounding": bounding})

    def add(
        self, name: str, type_: str, height: int, /, *inputs: tuple[str, str, int], **widgets: Any
    ) -> None:
        """A node below the last; ``inputs`` are (input, name of a node, number of its output)."""
        bounding = self.columns[-1][-1]["bounding"]
        self.nodes.append(
            {
                "name": name,
                "type": type_,
                "pos": [bounding[0] + _MARGIN, self._top],
                "size": [_COLUMN - 2 * _MARGIN, height],
                "widgets": widgets,
            }
        )
        self.links += [(node, output, name, taken) for taken, node, output in inputs]
        bounding[3] = self._top + height + _MARGIN - bounding[1]
        self._top += height + _TITLE + _GAP

    def described(self) -> dict[str, Any]:
        """As `buildWorkflow` takes it."""
        _, _, _, lowest = self.extent(0)
        for column in self.columns:
            column[-1]["bounding"][3] = lowest - column[-1]["bounding"][1]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"xdit-sidecar/{self.name}")),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [group for column in self.columns for group in column],
            "view": {"scale": 0.7, "offset": [120, 120]},
        }

    def extent(self, margin: int) -> tuple[int, int, int, int]:
        """(left, top, width, height) of all groups together with a margin."""
        width = len(self.columns) * (_COLUMN + _GAP) - _GAP
        height = max(_bottom(column[-1]) for column in self.columns)
        return -margin, -margin, width + 2 * margin, height + 2 * margin


def _bottom(group: dict[str, Any]) -> int:
    return int(group["bounding"][1] + group["bounding"][3])


def _loaders(graph: Graph, note: str) -> None:
    graph.column("Load", "#3f789e")
    graph.add("note", "MarkdownNote", 170, text=note)
    graph.add(
        *("model", "XDiTUNetLoader", 210),
        unet_name="flux1-dev.safetensors",
        weight_dtype="default",
        ulysses="auto",
        ring="1",
        cfg_parallel="1",
        on_problem="stop",
        keep_resident=True,
    )
    graph.add(
        *("clip", "XDiTLoadDualCLIP", 140),
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp16.safetensors",
        device="default",
        on_problem="stop",
    )
    graph.add("vae", "XDiTLoadVAE", 90, vae_name="ae.safetensors", on_problem="stop")


_DESCRIBE = ("Describe", "#3f9e4d")


def _describe(graph: Graph) -> None:
    graph.add("prompt", "CLIPTextEncode", 160, ("clip", "clip", 0), text=_PROMPT)
    graph.add("guidance", "FluxGuidance", 60, ("conditioning", "prompt", 0), guidance=3.5)
    graph.add("nothing", "ConditioningZeroOut", 30, ("conditioning", "prompt", 0))


def _empty_latent(graph: Graph) -> None:
    graph.group("Size", "#3a8a8a")
    graph.add("latent", "EmptySD3LatentImage", 110, width=1024, height=1024, batch_size=1)


def _sample(
    graph: Graph,
    model: str = "model",
    sampler: str = "KSampler",
    *further: tuple[str, str, int],
    denoise: float = 1.0,
) -> None:
    graph.column("Sample", "#8a8a3a")
    graph.add(
        *("sampler", sampler, 270 + 20 * len(further)),
        ("model", model, 0),
        ("positive", "guidance", 0),
        ("negative", "nothing", 0),
        ("latent_image", "latent", 0),
        *further,
        seed=_SEED,
        control_after_generate="randomize",
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=denoise,
    )


def _save(graph: Graph, prefix: str, *, decode: bool = True) -> None:
    graph.group("Save", "#b06634")
    source = ("images", "sampler", 1)
    if decode:
        graph.add("decode", "XDiTVAEDecode", 60, ("samples", "sampler", 0), ("vae", "vae", 0))
        source = ("images", "decode", 0)
    graph.add("save", "SaveImage", 310, source, filename_prefix=f"xdit/{prefix}")


def text_to_image() -> Graph:
    """The stock KSampler on the daemon's model."""
    graph = Graph("flux_text_to_image")
    _loaders(graph, f"{_START}\n\n{_FILES} and press Run.")
    graph.column(*_DESCRIBE)
    _describe(graph)
    _empty_latent(graph)
    _sample(graph)
    _save(graph, "text_to_image")
    return graph


def image_to_image() -> Graph:
    """A picture, scaled, encoded and partly drawn anew by the daemon."""
    graph = Graph("flux_image_to_image")
    _loaders(
        graph, f"{_START}\n\n{_FILES}, choose a picture, and set denoise: lower keeps more of it."
    )
    graph.column(*_DESCRIBE)
    _describe(graph)
    graph.group("Picture", "#3a8a8a")
    graph.add("picture", "LoadImage", 310, image=PICTURE)
    # To the nearest of the sizes that FLUX.1 draws well, about a million pixels.
    graph.add("scaled", "FluxKontextImageScale", 30, ("image", "picture", 0))
    graph.add("latent", "XDiTVAEEncode", 60, ("pixels", "scaled", 0), ("vae", "vae", 0))
    _sample(graph, denoise=0.75)
    _save(graph, "image_to_image")
    return graph


def lora() -> Graph:
    """A LoRA by the stock loader; the ranks apply it beside the shared weights."""
    graph = Graph("flux_lora")
    _loaders(
        graph,
        f"{_START}\n\n{_FILES}, choose your LoRA and its strength. Several go one after another.",
    )
    graph.column("LoRA", "#a1309b")
    graph.add(
        *("lora", "LoraLoaderModelOnly", 90, ("model", "model", 0)),
        lora_name="my_flux_lora.safetensors",
        strength_model=1.0,
    )
    graph.group(*_DESCRIBE)
    _describe(graph)
    _empty_latent(graph)
    _sample(graph, "lora")
    _save(graph, "lora")
    return graph


def xdit_ksampler() -> Graph:
    """All steps and the decoding in the daemon."""
    graph = Graph("flux_xdit_ksampler")
    _loaders(
        graph,
        f"{_START}\n\n{_FILES}. XDiT KSampler has all steps and the decoding done by the daemon, "
        "with euler, ddim, heun or dpmpp_2m; the node tells which way it took.",
    )
    graph.column(*_DESCRIBE)
    _describe(graph)
    _empty_latent(graph)
    _sample(graph, "model", "XDiTKSampler", ("vae", "vae", 0))
    _save(graph, "xdit_ksampler", decode=False)
    return graph


ALL = (text_to_image, image_to_image, lora, xdit_ksampler)
