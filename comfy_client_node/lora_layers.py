"""LoRA patches of a ComfyUI model in the ranks' layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import comfy.utils
import torch

from ..protocol import limits
from .refusals import CannotBeRemote

_PREFIX = "diffusion_model."
# The halves of a weight's rows change places: the same as doing so with those of "up".
_SWAP = comfy.utils.swap_scale_shift


class Layer(NamedTuple):
    """Patches that have one strength: LoRAs, or parts of them."""

    strength: float
    tensors: dict[str, torch.Tensor]  # in the ranks' layout: module.down, .up, .alpha


class _Rows(NamedTuple):
    """Of a weight, ``stop`` not included; all of them where nothing else is said."""

    start: int = 0
    stop: int | None = None

    @property
    def suffix(self) -> str:
        """Behind the weight's name in the ranks' layout."""
        return "" if self.stop is None else f"[{self.start}:{self.stop}]"

    def meets(self, other: _Rows) -> bool:
        """Whether both have a row."""
        if self.stop is None or other.stop is None:
            return True
        return self.start < other.stop and other.start < self.stop


class _Pair(NamedTuple):
    """One patch of some rows of a weight."""

    module: str
    rows: _Rows
    strength: float
    parts: dict[str, torch.Tensor]  # down, up, alpha


def read_patches(patches: Mapping[str, Any]) -> list[Layer]:
    """ComfyUI's patches (key → list of (strength, adapter, model strength, offset, function)).

    Patches of one weight add up, so they are dealt out over layers, of one strength each, in which
    no rows are patched twice: query, key and value of a file with diffusers' names share one.
    Raises CannotBeRemote.
    """
    layers: dict[float, list[Layer]] = {}
    taken: dict[tuple[float, int, str], list[_Rows]] = {}
    for pair in _read(patches):
        fitting = layers.setdefault(pair.strength, [])
        number = 0
        while any(map(pair.rows.meets, taken.get((pair.strength, number, pair.module), ()))):
            number += 1
        if number == len(fitting):
            fitting.append(Layer(pair.strength, {}))
        taken.setdefault((pair.strength, number, pair.module), []).append(pair.rows)
        name = pair.module + pair.rows.suffix
        fitting[number].tensors.update({f"{name}.{p}": part for p, part in pair.parts.items()})
    found = [layer for of_strength in layers.values() for layer in of_strength]
    if len(found) > limits.JOB_ADAPTERS:
        raise CannotBeRemote(
            f"{len(found)} LoRAs at once, of which {limits.JOB_ADAPTERS} are possible"
        )
    return found


def _read(patches: Mapping[str, Any]) -> Iterator[_Pair]:
    for key, entries in patches.items():
        module = key.removeprefix(_PREFIX).removesuffix(".weight")
        for strength, adapter, model_strength, offset, function in entries:
            if model_strength != 1.0 or function not in (None, _SWAP):
                raise CannotBeRemote(f"a transformed weight, or {key} merged (ModelMerge nodes)")
            parts = _parts(key, adapter)
            if function is not None:
                parts["up"] = function(parts["up"])
            yield _Pair(module, _rows(key, offset), float(strength), parts)


def _parts(key: str, adapter: Any) -> dict[str, torch.Tensor]:
    if isinstance(adapter, list):  # the other model's weight, and its patches
        raise CannotBeRemote(f"{key} merged with another model's (ModelMerge nodes)")
    name = getattr(adapter, "name", None)
    if name != "lora":
        kind = name or (adapter[0] if isinstance(adapter, tuple) and adapter else "unknown")
        raise CannotBeRemote(f"a patch of another kind than LoRA ({kind}, of {key})")
    up, down, alpha, middle, dora, reshape = (*adapter.weights, None, None)[:6]
    if middle is not None or dora is not None or reshape is not None:
        raise CannotBeRemote(f"a LoRA with more than two matrices for a weight (DoRA…, {key})")
    parts = {"down": down.flatten(1).contiguous(), "up": up.flatten(1).contiguous()}
    return parts if alpha is None else {**parts, "alpha": torch.tensor(float(alpha))}


def _rows(key: str, offset: Any) -> _Rows:
    if offset is None:
        return _Rows()
    axis, start, count = offset
    if axis != 0:
        raise CannotBeRemote(f"a LoRA of some columns of {key}")
    return _Rows(start, start + count)
