"""From the header of a safetensors file to the sizes of its FLUX.1 model, or to one clear sentence.

Nothing but names, dtypes and shapes is looked at. Every tensor is checked, so that a file which is
accepted here can be loaded strictly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ...protocol.errors import UnsupportedModel
from ...protocol.manifest import TensorSpec
from ...protocol.safetensors_file import SafetensorsFile
from .flux_config import FluxConfig
from .flux_layers import (
    FP8_MARKER,
    UNUSED_LEAVES,
    WEIGHT_SCALES,
    FluxLayer,
    flux_layers,
    published_name,
)
from .other_models import recognise_component, recognise_diffusion_model

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F32", "F16", "BF16")
CHECKPOINT_PREFIX = "model.diffusion_model."
_BLOCK = re.compile(r"(double|single)_blocks\.([0-9]{1,5})\.")
_SUPPORTED = (
    "supported are FLUX.1 transformers (dev, schnell, Kontext, Fill, Canny, Depth) in the layout "
    "of Black Forest Labs and ComfyUI, in fp32, fp16, bf16 or fp8 (also scaled)"
)
# diffusers' FLUX has this ratio built in, and so has every FLUX.1 there is.
_MLP_RATIO = 4
# The smallest head whose three RoPE axes all have a pair of elements.
_SMALLEST_HEAD = 6
# A token is 2 by 2 latent pixels.
_PIXELS = 4
_NAMED = 3


def detect_flux_file(file: SafetensorsFile) -> FluxConfig:
    """The config of the FLUX.1 model in a file. Raises UnsupportedModel."""
    return detect_flux([tensor.spec for tensor in file.tensors], file.label)


def detect_flux(tensors: Iterable[TensorSpec], label: str) -> FluxConfig:
    """The config of the FLUX.1 model whose tensors these are: of a file, or of a region.

    Where the names have the prefix of whole checkpoints, only those with it count. ``label`` names
    the file in errors. Raises :class:`~.unsupported.UnsupportedModel` for other models, incomplete
    files, unknown tensors, and shapes or dtypes that FLUX.1 cannot have.
    """
    return _Detection(list(tensors), label).detect()


class _Detection:
    def __init__(self, tensors: list[TensorSpec], label: str) -> None:
        shown = repr(label)
        self.label = shown if len(shown) <= 160 else f"{shown[:100]}…{shown[-50:]}"
        whole = any(tensor.name.startswith(CHECKPOINT_PREFIX) for tensor in tensors)
        self.prefix = CHECKPOINT_PREFIX if whole else ""
        self.original = [t.name for t in tensors]
        self.tensors: dict[str, TensorSpec] = {}
        for tensor in tensors:
            if tensor.name.startswith(self.prefix):
                name = published_name(tensor.name.removeprefix(self.prefix))
                if name in self.tensors:
                    raise self._refusal(f"has {name} twice, as its scale and as its weight")
                self.tensors[name] = tensor

    def detect(self) -> FluxConfig:
        self._check_architecture()
        config = self._read_sizes()
        layers = list(flux_layers(config))
        self._check_complete(layers)
        self._check_shapes(layers)
        self._check_dtypes(layers)
        self._check_the_rest(layers)
        return config

    # --- sentences

    def _refusal(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.label} {what}; {_SUPPORTED}")

    def _incomplete(self, missing: list[str]) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.label} is an incomplete FLUX.1 transformer: {_list(missing)} missing; copy or "
            "download the whole file again (a shard of a split model cannot be loaded)"
        )

    # --- checks

    def _check_architecture(self) -> None:
        other = recognise_diffusion_model(self.tensors)
        if other is not None:
            raise self._refusal(f"is {other}")
        if any(_BLOCK.match(name) for name in self.tensors):
            return
        other = recognise_component(self.original)
        if other is not None:
            raise self._refusal(f"is {other}")
        names = ", ".join(_short(name) for name in sorted(self.original)[:_NAMED])
        raise self._refusal(
            f"is no diffusion model that is known here (its tensors: {names or 'none'})"
        )

    def _read_sizes(self) -> FluxConfig:
        norm = "double_blocks.0.img_attn.norm.query_norm.scale"
        dimensions = {
            "img_in.weight": 2,
            "txt_in.weight": 2,
            "vector_in.in_layer.weight": 2,
            "final_layer.linear.weight": 2,
            "double_blocks.0.img_mlp.0.weight": 2,
            norm: 1,
        }
        missing = [name for name in dimensions if name not in self.tensors]
        if missing:
            raise self._incomplete(missing)
        shapes = {name: self.tensors[name].shape for name in dimensions}
        for name, shape in shapes.items():
            if len(shape) != dimensions[name] or 0 in shape:
                raise self._refusal(f"has a FLUX.1 tensor of an impossible shape, {name} {shape}")
        hidden_size, in_channels = shapes["img_in.weight"]
        out_channels = shapes["final_layer.linear.weight"][0]
        if in_channels % _PIXELS or out_channels % _PIXELS:
            raise self._refusal(
                f"takes {in_channels} and gives {out_channels} channels per token: not those of "
                "2 by 2 latent pixels"
            )
        head_size = shapes[norm][0]
        if hidden_size % head_size or head_size % 2 or head_size < _SMALLEST_HEAD:
            raise self._refusal(
                f"has attention heads of {head_size} elements ({norm}), which a model of width "
                f"{hidden_size} cannot have"
            )
        mlp_size = shapes["double_blocks.0.img_mlp.0.weight"][0]
        if mlp_size != _MLP_RATIO * hidden_size:
            raise self._refusal(
                f"has MLPs of {mlp_size} elements in a model of width {hidden_size}, FLUX.1 has "
                f"{_MLP_RATIO} times the width"
            )
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        return FluxConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_size=hidden_size,
            head_size=head_size,
            mlp_size=mlp_size,
            double_blocks=self._count_blocks("double"),
            single_blocks=self._count_blocks("single"),
            context_width=shapes["txt_in.weight"][1],
            pooled_width=shapes["vector_in.in_layer.weight"][1],
            guidance=any(name.startswith("guidance_in.") for name in self.tensors),
            dtypes=tuple(dtype for dtype, nbytes in sizes.most_common() if nbytes),
            scaled=any(_leaf(name) in WEIGHT_SCALES for name in self.tensors),
            prefix=self.prefix,
            nbytes=sizes.total(),
        )

    def _count_blocks(self, kind: str) -> int:
        found = {
            int(match[2])
            for name in self.tensors
            if (match := _BLOCK.match(name)) and match[1] == kind
        }
        absent = [number for number in range(len(found)) if number not in found]
        if absent:
            raise self._incomplete([f"{kind}_blocks.{number}.*" for number in absent])
        return len(found)

    def _check_complete(self, layers: list[FluxLayer]) -> None:
        missing = [name for layer in layers for name in layer.shapes if name not in self.tensors]
        if missing:
            raise self._incomplete(missing)

    def _check_shapes(self, layers: list[FluxLayer]) -> None:
        for layer in layers:
            for name, shape in layer.shapes.items():
                found = self.tensors[name]
                if found.shape != shape:
                    raise self._refusal(
                        f"has the tensor {name} in shape {found.shape}, the others need {shape}"
                    )
                if found.strides is not None:
                    raise self._refusal(f"has the tensor {name} in another order than row-major")

    def _check_dtypes(self, layers: list[FluxLayer]) -> None:
        for layer in layers:
            for name in layer.shapes:
                dtype = self.tensors[name].dtype
                if dtype not in WEIGHT_DTYPES:
                    raise self._refusal(f"has the tensor {name} in the dtype {dtype}")

    def _check_the_rest(self, layers: list[FluxLayer]) -> None:
        """Scales must be one number per layer; what nobody asks for would silently not work."""
        known = {name for layer in layers for name in layer.shapes}
        linear = {layer.source for layer in layers if layer.columns is not None}
        scaled: set[str] = set()
        unknown = []
        for name, tensor in self.tensors.items():
            source, _, leaf = name.rpartition(".")
            if name in known or name == FP8_MARKER:
                continue
            if source not in linear or leaf not in (*WEIGHT_SCALES, *UNUSED_LEAVES):
                unknown.append(name)
            elif leaf in WEIGHT_SCALES:
                if tensor.shape not in ([], [1]) or tensor.dtype not in _SCALE_DTYPES:
                    raise self._refusal(
                        f"has the fp8 scale {name} as {tensor.dtype} {tensor.shape}: only one "
                        "number for a whole tensor is known here"
                    )
                if source in scaled:
                    raise self._refusal(f"has two fp8 scales for {source}")
                scaled.add(source)
        if unknown:
            raise self._refusal(f"has tensors that FLUX.1 does not have: {_list(unknown)} unknown")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _list(names: list[str]) -> str:
    """``a, b, c and 4 more are``, to go before an adjective."""
    shown = ", ".join(_short(name) for name in names[:_NAMED])
    if len(names) > _NAMED:
        return f"{shown} and {len(names) - _NAMED} more are"
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:50]}…{name[-25:]}"
