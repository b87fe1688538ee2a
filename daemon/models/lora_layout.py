"""How the tensors of a FLUX.1 LoRA file are called, and what each of them is; without torch.

Inside the daemon a LoRA has one *neutral* layout. For each patched weight of the BFL model there
are ``<module>.down`` [rank, columns], ``<module>.up`` [rows, rank] and perhaps ``<module>.alpha``
(one number; the branch is multiplied by alpha / rank, else by 1). ``<module>[start:stop].down`` and
so on patch only these rows of the weight: files with diffusers' names have query, key and value
apart where BFL's model has one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ...protocol.errors import UnsupportedModel
from .flux_config import FluxConfig
from .flux_layers import flux_layers

# Before the name of a module, as kohya, ComfyUI, diffusers, PEFT, OneTrainer and LyCORIS write it.
_PREFIXES = (
    *("diffusion_model.", "lora_unet_", "transformer.", "base_model.model."),
    *("lora_transformer_", "lycoris_"),
)
_TEXT_ENCODER = re.compile(r"(lora_(prior_)?te[0-9]?_|text_encoders?(_[0-9])?\.)")
# Behind it: (down, up).
_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
_PARTS = {
    **{down: "down" for down, _ in _PAIRS},
    **{up: "up" for _, up in _PAIRS},
    ".alpha": "alpha",
}
# What else there is, by a piece of its name.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon with a middle convolution",
    "reshape_weight": "a LoRA that widens a layer",
    "lora_B.bias": "a LoRA with biases",
    ".diff": "a full difference",
    "set_weight": "a replaced weight",
    "_norm": "a replaced norm",
}
_BLOCK = re.compile(r"((?:double|single|transformer|single_transformer)_blocks_)([0-9]{1,5})_")
_NEUTRAL = re.compile(r"(?P<module>[^\[\]]+)(\[(?P<start>[0-9]+):(?P<stop>[0-9]+)\])?")
_NAMED = 3


class Rows(NamedTuple):
    """A range of rows, ``stop`` not included."""

    start: int
    stop: int


class BranchName(NamedTuple):
    """Which rows of which of BFL's weights a branch patches; None: all of them."""

    module: str
    rows: Rows | None = None

    def __str__(self) -> str:
        return self.module if self.rows is None else f"{self.module}[{self.rows[0]}:{self.rows[1]}]"

    @classmethod
    def parse(cls, text: str) -> BranchName:
        """From ``module`` or ``module[start:stop]``. Raises ValueError."""
        match = _NEUTRAL.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no branch: write module or module[start:stop]")
        start, stop = match["start"], match["stop"]
        return cls(match["module"], None if start is None else Rows(int(start), int(stop)))


class Source(NamedTuple):
    """A tensor of the file, or some of its rows."""

    name: str
    rows: Rows | None = None


@dataclass(frozen=True)
class LoraLayout:
    """``sources``: neutral name → where in the file it is. ``text_encoder``: names of the file's
    tensors for text encoders, which the transformer has no use for."""

    sources: dict[str, Source]
    text_encoder: tuple[str, ...]


def read_layout(shapes: Mapping[str, Sequence[int]], label: str = "the LoRA") -> LoraLayout:
    """What a file with tensors of these names and shapes is in the neutral layout.

    Known are the names of kohya, ComfyUI, diffusers, PEFT and OneTrainer, for BFL's and for
    diffusers' modules. ``label`` names the file in errors. Raises UnsupportedModel for anything
    that is no pair of matrices for a weight of FLUX.1: nothing is skipped.
    """
    pairs: dict[str, _Pair] = {}
    text_encoder = []
    unknown: dict[str, str] = {}
    for name in shapes:
        if _TEXT_ENCODER.match(name):
            text_encoder.append(name)
            continue
        own, part = _split(name)
        if not part:
            unknown[name] = _kind(name)
            continue
        module = _find(own)
        if module is None:
            unknown[name] = "for a weight that FLUX.1 does not have"
            continue
        parts = pairs.setdefault(own, _Pair(module, {})).parts
        if parts.setdefault(part, name) != name:
            raise UnsupportedModel(
                f"{label} has {parts[part]} and {name}, two names for one tensor"
            )
    if unknown:
        raise UnsupportedModel(f"{label} cannot run beside FLUX.1: {_list(unknown)}; {_SUPPORTED}")
    if not pairs and not text_encoder:
        raise UnsupportedModel(f"{label} has no tensors; {_SUPPORTED}")
    sources: dict[str, Source] = {}
    for pair in pairs.values():
        for name, source in _sources(pair, shapes, label):
            if name in sources:
                raise UnsupportedModel(
                    f"{label} patches {name.rpartition('.')[0]} twice, by {source.name} and "
                    f"{sources[name].name}; keep one of them"
                )
            sources[name] = source
    return LoraLayout(sources, tuple(text_encoder))


_SUPPORTED = "supported are low-rank pairs (down and up, or A and B) for its linear layers"


def _split(name: str) -> tuple[str, str]:
    """(module, part) of a tensor's name; no part: it belongs to no low-rank pair."""
    for suffix, part in _PARTS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), part
    return name, ""


def _kind(name: str) -> str:
    return next((kind for piece, kind in _OTHER_KINDS.items() if piece in name), "unknown")


def _list(unknown: Mapping[str, str]) -> str:
    names = sorted(unknown)
    shown = ", ".join(f"{name} ({unknown[name]})" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


class _Module(NamedTuple):
    """A module under one of its names: rows ``part`` of the ``parts`` of BFL's ``source``."""

    source: str
    part: int
    parts: int
    swapped: bool


class _Pair(NamedTuple):
    """The tensors of one module: part → the tensor's name."""

    module: _Module
    parts: dict[str, str]


def _find(module: str) -> _Module | None:
    """The module of FLUX.1 with this name, of any block."""
    for prefix in ("", *_PREFIXES):
        if not module.startswith(prefix):
            continue
        name = module.removeprefix(prefix).replace(".", "_")
        block = _BLOCK.match(name)
        if block is None:
            found = _modules().get(name)
        else:
            found = _modules().get(f"{block[1]}0_{name[block.end() :]}")
        if found is not None:
            number = "0" if block is None else block[2]
            return found._replace(source=found.source.replace(".0.", f".{int(number)}.", 1))
    return None


@cache
def _modules() -> dict[str, _Module]:
    """Name with underscores → module, for all linear layers and the first block of each kind."""
    smallest = FluxConfig(
        in_channels=4,
        out_channels=4,
        hidden_size=8,
        head_size=8,
        mlp_size=32,
        double_blocks=1,
        single_blocks=1,
        context_width=8,
        pooled_width=8,
        guidance=True,
        dtypes=(),
        scaled=False,
        prefix="",
        nbytes=0,
    )
    modules: dict[str, _Module] = {}
    for layer in flux_layers(smallest):
        if layer.columns is None:
            continue
        names = {layer.source: _Module(layer.source, 0, 1, False)}
        for part, target in enumerate(layer.targets):
            names[target.module] = _Module(layer.source, part, len(layer.targets), layer.swapped)
        if layer.source.endswith(".linear1"):
            # USO's files and ComfyUI call query, key and value together so.
            names[f"{layer.source}_qkv"] = _Module(layer.source, 0, 4, False)
        modules |= {name.replace(".", "_"): module for name, module in names.items()}
    return modules


def _sources(
    pair: _Pair, shapes: Mapping[str, Sequence[int]], label: str
) -> Iterable[tuple[str, Source]]:
    """The neutral tensors of one pair."""
    parts = pair.parts
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise UnsupportedModel(
            f"{label} has {min(parts.values())}, but nothing for its "
            f"{' and '.join(sorted(missing))}; download the file again"
        )
    down, up = tuple(shapes[parts["down"]]), tuple(shapes[parts["up"]])
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not all((*down, *up)):
        raise UnsupportedModel(
            f"{label} has {parts['down']} {list(down)} and {parts['up']} {list(up)}: these are no "
            "matrices [rank, columns] and [rows, rank]"
        )
    for branch, rows in _branches(pair.module, rows=up[0], columns=down[1]):
        yield f"{branch}.down", Source(parts["down"])
        yield f"{branch}.up", Source(parts["up"], rows)
        if "alpha" in parts:
            yield f"{branch}.alpha", Source(parts["alpha"])


def _branches(
    module: _Module, *, rows: int, columns: int
) -> Iterable[tuple[BranchName, Rows | None]]:
    """The branches that a pair for this module makes, and which rows of its up matrix each has."""
    if module.swapped:
        # diffusers has the scale first, BFL the shift.
        half = rows // 2
        yield BranchName(module.source, Rows(0, half)), Rows(half, rows)
        yield BranchName(module.source, Rows(half, rows)), Rows(0, half)
    elif module.parts == 1:
        yield BranchName(module.source), None
    else:
        # Query, key and value have as many rows as they have columns; so do all that precede the
        # MLP.
        start = module.part * columns
        yield BranchName(module.source, Rows(start, start + rows)), None
