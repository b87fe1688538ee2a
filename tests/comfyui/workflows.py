"""Workflows in ComfyUI's API format, for the tiny checkpoints.

Every builder takes the classes of the nodes that load, encode and decode, so that others can take
the place of the stock ones in the same workflow:

    ours = replace(STOCK, model="SomeLoader", model_inputs={"file": "tiny-flux.safetensors"})
    server.run(text_to_image(ours, save="ours"))

The nodes have readable ids, such as "model", "sampler" and "save_latent".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from comfyui import tiny_checkpoints as files

Workflow = dict[str, dict[str, Any]]
Link = list[Any]  # [id of a node, number of its output]
Lora = tuple[str, float]  # file, strength

PROMPT = "a lighthouse (in a storm:1.2), oil on canvas"
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Nodes:
    """Class names of nodes, and the inputs of those that load."""

    model: str = "UNETLoader"
    model_inputs: Mapping[str, Any] = field(
        default_factory=lambda: {"unet_name": files.DIFFUSION_MODEL, "weight_dtype": "default"}
    )
    clip: str = "DualCLIPLoader"
    clip_inputs: Mapping[str, Any] = field(
        default_factory=lambda: {
            "clip_name1": files.CLIP_L,
            "clip_name2": files.T5XXL,
            "type": "flux",
        }
    )
    vae: str = "VAELoader"
    vae_inputs: Mapping[str, Any] = field(default_factory=lambda: {"vae_name": files.AUTOENCODER})
    lora: str = "LoraLoaderModelOnly"
    encode_text: str = "CLIPTextEncode"
    encode_image: str = "VAEEncode"
    decode: str = "VAEDecode"
    checkpoint: str = ""  # one node for all three, such as CheckpointLoaderSimple
    checkpoint_inputs: Mapping[str, Any] = field(
        default_factory=lambda: {"ckpt_name": files.CHECKPOINT}
    )


STOCK = Nodes()
WHOLE_CHECKPOINT = Nodes(checkpoint="CheckpointLoaderSimple")


@dataclass(frozen=True)
class Settings:
    """What the sampler nodes and the prompts are given; sizes in pixels."""

    prompt: str = PROMPT
    negative: str = NEGATIVE
    guidance: float = 3.5
    seed: int = 7
    steps: int = 4
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    width: int = 128
    height: int = 128
    batch: int = 1
    loras: Sequence[Lora] = ()


class Graph:
    """A workflow being built."""

    def __init__(self) -> None:
        self.workflow: Workflow = {}

    def add(self, name: str, class_type: str, /, **inputs: Any) -> Link:
        """A node with that id; the link of its first output."""
        assert name not in self.workflow, f"two nodes are named {name}"
        self.workflow[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]


class _Common(Graph):
    """What all workflows begin and end with."""

    def __init__(self, nodes: Nodes, settings: Settings) -> None:
        super().__init__()
        self.nodes, self.settings = nodes, settings
        self.model, self.clip, self.vae = self._load()
        for number, (name, strength) in enumerate(settings.loras):
            self.model = self.add(
                f"lora{number}",
                nodes.lora,
                model=self.model,
                lora_name=name,
                strength_model=strength,
            )
        positive = self._encode("positive", settings.prompt)
        self.positive = self.add(
            "guidance", "FluxGuidance", conditioning=positive, guidance=settings.guidance
        )
        self.negative = self._encode("negative", settings.negative)

    def _load(self) -> tuple[Link, Link, Link]:
        nodes = self.nodes
        if nodes.checkpoint:
            self.add("checkpoint", nodes.checkpoint, **nodes.checkpoint_inputs)
            return ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2]
        return (
            self.add("model", nodes.model, **nodes.model_inputs),
            self.add("clip", nodes.clip, **nodes.clip_inputs),
            self.add("vae", nodes.vae, **nodes.vae_inputs),
        )

    def _encode(self, name: str, text: str) -> Link:
        return self.add(name, self.nodes.encode_text, clip=self.clip, text=text)

    def empty_latent(self) -> Link:
        settings = self.settings
        return self.add(
            "latent",
            "EmptySD3LatentImage",
            width=settings.width,
            height=settings.height,
            batch_size=settings.batch,
        )

    def encode_picture(self, name: str, picture: str) -> Link:
        loaded = self.add(f"{name}_picture", "LoadImage", image=picture)
        return self.add(name, self.nodes.encode_image, pixels=loaded, vae=self.vae)

    def sample(self, latent: Link, positive: Link | None = None) -> Link:
        settings = self.settings
        return self.add(
            "sampler",
            "KSampler",
            model=self.model,
            positive=positive or self.positive,
            negative=self.negative,
            latent_image=latent,
            seed=settings.seed,
            steps=settings.steps,
            cfg=settings.cfg,
            sampler_name=settings.sampler,
            scheduler=settings.scheduler,
            denoise=settings.denoise,
        )

    def finish(self, latent: Link, save: str, *, picture: bool) -> Workflow:
        """Save the latent as ``save``, and the decoded picture as ``save-image`` and as PNG."""
        self.add("save_latent", "TestSaveTensors", name=save, samples=latent)
        if picture:
            image = self.add("decode", self.nodes.decode, samples=latent, vae=self.vae)
            self.add("save_tensor", "TestSaveTensors", name=f"{save}-image", images=image)
            self.add("save_image", "SaveImage", images=image, filename_prefix=save)
        return self.workflow


def text_to_image(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
) -> Workflow:
    """Text to picture with KSampler."""
    graph = _Common(nodes, settings or Settings())
    return graph.finish(graph.sample(graph.empty_latent()), save, picture=picture)


def image_to_image(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
    source: str = files.PICTURE,
) -> Workflow:
    """A picture of the input folder, encoded, partly noised and sampled; half of it by default."""
    graph = _Common(nodes, settings or Settings(denoise=0.5))
    return graph.finish(graph.sample(graph.encode_picture("latent", source)), save, picture=picture)


def masked(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
    source: str = files.PICTURE,
) -> Workflow:
    """As `image_to_image`, but only the left half of the picture is sampled anew."""
    graph = _Common(nodes, settings or Settings(denoise=0.75))
    width, height = graph.settings.width, graph.settings.height
    latent = graph.encode_picture("latent", source)
    nothing = graph.add("mask_none", "SolidMask", value=0.0, width=width, height=height)
    half = graph.add("mask_half", "SolidMask", value=1.0, width=width // 2, height=height)
    mask = graph.add(
        "mask", "MaskComposite", destination=nothing, source=half, x=0, y=0, operation="add"
    )
    limited = graph.add("masked", "SetLatentNoiseMask", samples=latent, mask=mask)
    return graph.finish(graph.sample(limited), save, picture=picture)


def advanced(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
    start: int = 0,
    end: int = 10000,
    leftover_noise: bool = False,
) -> Workflow:
    """KSampler (Advanced): the steps from ``start`` to ``end``."""
    graph = _Common(nodes, settings or Settings())
    settings = graph.settings
    sampled = graph.add(
        "sampler",
        "KSamplerAdvanced",
        model=graph.model,
        positive=graph.positive,
        negative=graph.negative,
        latent_image=graph.empty_latent(),
        add_noise="enable",
        noise_seed=settings.seed,
        steps=settings.steps,
        cfg=settings.cfg,
        sampler_name=settings.sampler,
        scheduler=settings.scheduler,
        start_at_step=start,
        end_at_step=end,
        return_with_leftover_noise="enable" if leftover_noise else "disable",
    )
    return graph.finish(sampled, save, picture=picture)


def custom(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
    guider: Literal["BasicGuider", "CFGGuider"] = "BasicGuider",
) -> Workflow:
    """SamplerCustomAdvanced with either guider; CFGGuider takes the settings' cfg."""
    graph = _Common(nodes, settings or Settings())
    settings = graph.settings
    if guider == "BasicGuider":
        guiding = graph.add("guider", guider, model=graph.model, conditioning=graph.positive)
    else:
        guiding = graph.add(
            "guider",
            guider,
            model=graph.model,
            positive=graph.positive,
            negative=graph.negative,
            cfg=settings.cfg,
        )
    sigmas = graph.add(
        "sigmas",
        "BasicScheduler",
        model=graph.model,
        scheduler=settings.scheduler,
        steps=settings.steps,
        denoise=settings.denoise,
    )
    sampled = graph.add(
        "sampler",
        "SamplerCustomAdvanced",
        noise=graph.add("noise", "RandomNoise", noise_seed=settings.seed),
        guider=guiding,
        sampler=graph.add("method", "KSamplerSelect", sampler_name=settings.sampler),
        sigmas=sigmas,
        latent_image=graph.empty_latent(),
    )
    return graph.finish(sampled, save, picture=picture)


def kontext(
    nodes: Nodes = STOCK,
    settings: Settings | None = None,
    *,
    save: str = "result",
    picture: bool = True,
    references: Sequence[str] = (files.PICTURE_OTHER,),
) -> Workflow:
    """FLUX.1 Kontext: encoded pictures go to the model beside the latent, as further tokens."""
    graph = _Common(nodes, settings or Settings())
    positive = graph.positive
    for number, reference in enumerate(references):
        latent = graph.encode_picture(f"reference{number}_latent", reference)
        positive = graph.add(
            f"reference{number}", "ReferenceLatent", conditioning=positive, latent=latent
        )
    return graph.finish(graph.sample(graph.empty_latent(), positive), save, picture=picture)


def encode_only(
    nodes: Nodes = STOCK, settings: Settings | None = None, *, save: str = "result"
) -> Workflow:
    """The positive conditioning, saved."""
    graph = _Common(nodes, settings or Settings())
    graph.add("save_conditioning", "TestSaveTensors", name=save, conditioning=graph.positive)
    return graph.workflow


def coding(
    nodes: Nodes = STOCK, settings: Settings | None = None, *, save: str = "result"
) -> Workflow:
    """The positive conditioning, and a picture that was encoded and decoded; nothing is sampled."""
    graph = _Common(nodes, settings or Settings())
    graph.add("save_conditioning", "TestSaveTensors", name=save, conditioning=graph.positive)
    latent = graph.encode_picture("latent", files.PICTURE)
    graph.finish(latent, f"{save}-latent", picture=True)
    return graph.workflow


def report(nodes: Nodes = STOCK, *, load: bool = True, loras: Sequence[Lora] = ()) -> Workflow:
    """Where the parameters of the model, the text encoders and the VAE lie."""
    graph = _Common(nodes, Settings(loras=loras))
    graph.add(
        "report",
        "TestReportParameters",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        load=load,
    )
    return graph.workflow
