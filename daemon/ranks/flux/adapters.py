"""LoRA beside FLUX.1's weights: low-rank side branches, chosen per forward.

The shared bytes are never patched: a linear layer that a branch is for computes
``base(x) + scale · (x @ down.T) @ up.T`` (LoRA: https://arxiv.org/abs/2106.09685) while the stack
is applied, and is as it was before and after. The neutral layout of a LoRA's tensors is described
in :mod:`...models.lora_layout`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...models.flux_config import FluxConfig
from ...models.flux_layers import FluxLayer, flux_layers
from ...models.lora_layout import BranchName, Rows, read_layout
from .branches import Added, Branch, adding


class LoraFile(NamedTuple):
    """``tensors``: in the neutral layout, views of the file's; ``text_encoder``: names of those
    that are for text encoders and not among them."""

    tensors: dict[str, Tensor]
    text_encoder: tuple[str, ...]


def from_file(tensors: Mapping[str, Tensor], label: str = "the LoRA") -> LoraFile:
    """The neutral layout of a LoRA file's tensors, without a copy.

    See :func:`...models.lora_layout.read_layout` for the names that are known. Raises
    UnsupportedModel, naming the tensors, for anything but low-rank pairs.
    """
    layout = read_layout({name: tensor.shape for name, tensor in tensors.items()}, label)
    neutral = {}
    for name, source in layout.sources.items():
        tensor = tensors[source.name]
        neutral[name] = tensor if source.rows is None else tensor[slice(*source.rows)]
    return LoraFile(neutral, layout.text_encoder)


class _Places(NamedTuple):
    """Where a stack's branches go in a model."""

    layers: list[nn.Linear]  # all there are
    added: Added


@dataclass(frozen=True, eq=False)
class LoraStack:
    """The branches of several LoRAs: name of diffusers' module → what is added to it, in order.

    ``copied_bytes`` were made for this stack because a LoRA's tensors have another dtype or lie on
    another device; all else are views of these tensors. ``identity`` outlives the stack without
    keeping its tensors.
    """

    branches: Mapping[str, tuple[Branch, ...]]
    copied_bytes: int
    identity: object = field(default_factory=object, init=False, repr=False)
    # Looking a model's layers up takes longer than a forward's launches.
    _places: WeakKeyDictionary[nn.Module, _Places] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @cached_property
    def modules(self) -> frozenset[str]:
        """Of diffusers', those that have branches."""
        return frozenset(self.branches)

    @classmethod
    def build(
        cls,
        config: FluxConfig,
        loras: Sequence[tuple[Mapping[str, Tensor], float]],
        compute_dtype: torch.dtype,
        device: torch.device | str,
    ) -> LoraStack:
        """From (tensors in the neutral layout, strength) each; a strength of 0 adds nothing.

        Tensors of any floating dtype, on any device. Raises ValueError for names, shapes or numbers
        that do not fit the model.
        """
        layers = {layer.source: layer for layer in flux_layers(config) if layer.columns is not None}
        branches: dict[str, list[Branch]] = {}
        copied = 0
        for tensors, strength in loras:
            if not math.isfinite(strength):
                raise ValueError(f"a LoRA's strength is {strength}; use a finite number")
            for name, parts in _gather(tensors).items():
                branch = _read(layers, name, parts, strength)
                if branch.scale == 0:
                    continue
                down = branch.down.to(device, compute_dtype)
                up = branch.up.to(device, compute_dtype)
                copied += sum(
                    new.nbytes
                    for new, old in ((down, branch.down), (up, branch.up))
                    if new is not old
                )
                for module, start, rows in _targets(layers[name.module], branch.start, len(up)):
                    piece = Branch(start, down, up[slice(*rows)], branch.scale)
                    branches.setdefault(module, []).append(piece)
        return cls({name: tuple(found) for name, found in branches.items()}, copied)

    def places(self, model: nn.Module) -> _Places:
        """The model's linear layers, and what is added to which.

        They are looked up at the first call for a model and must not be replaced afterwards.
        Raises ValueError if the model lacks one: then the stack was built for another config; and
        for a weight that several layers have, because branches are found by it.
        """
        found = self._places.get(model)
        if found is None:
            layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
            times = Counter(layer.weight.data_ptr() for layer in layers)
            added = {}
            for name, branches in self.branches.items():
                at = _linear(model, name).weight.data_ptr()
                if times[at] > 1:
                    raise ValueError(f"{name} has its weight in common with another layer")
                added[at] = branches
            found = self._places[model] = _Places(layers, added)
        return found


@contextmanager
def applied(model: nn.Module, stack: LoraStack | None) -> Iterator[None]:
    """Within it, the linear layers of a FluxTransformer2DModel have the stack's branches added.

    Parameters are not touched, and a model without LoRA pays nothing. Inside another ``applied`` of
    the same model both are added. Raises as :meth:`LoraStack.places` does.
    """
    if stack is None:
        yield
        return
    with adding(*stack.places(model)):
        yield


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = model
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"this model has no linear layer {name}: build the LoRA stack with the model's config"
        )
    return layer


def _gather(tensors: Mapping[str, Tensor]) -> dict[BranchName, dict[str, Tensor]]:
    """Branch → its parts by name."""
    found: dict[BranchName, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        branch, _, part = name.rpartition(".")
        if part not in ("down", "up", "alpha"):
            raise ValueError(f"{name} is no down, up or alpha: convert the LoRA by from_file")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}: a LoRA's tensors are floating-point")
        found.setdefault(BranchName.parse(branch), {})[part] = tensor
    return found


def _read(
    layers: Mapping[str, FluxLayer], name: BranchName, parts: Mapping[str, Tensor], strength: float
) -> Branch:
    """A checked branch in BFL's rows."""
    layer = layers.get(name.module)
    if layer is None:
        raise ValueError(f"this FLUX.1 has no weight {name.module}: the LoRA is for another model")
    missing = {"down", "up"} - parts.keys()
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(sorted(missing))}: hand over the pair")
    down, up = parts["down"], parts["up"]
    start, stop = name.rows or Rows(0, layer.rows)
    if not 0 <= start < stop <= layer.rows:
        raise ValueError(f"{name}: the weight has {layer.rows} rows")
    rank = down.shape[0] if down.ndim else 0
    expected = ((rank, layer.columns), (stop - start, rank))
    if not rank or (tuple(down.shape), tuple(up.shape)) != expected:
        raise ValueError(
            f"{name} has down {list(down.shape)} and up {list(up.shape)}; this model needs "
            f"[rank, {layer.columns}] and [{stop - start}, rank]: the LoRA is for another model"
        )
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{name}.alpha has shape {list(alpha.shape)}; it must be one number")
    scale = strength if alpha is None else strength * alpha.item() / rank
    if not math.isfinite(scale):
        raise ValueError(f"{name}.alpha is not finite: the LoRA's file is damaged")
    return Branch(start, down, up, scale)


def _targets(layer: FluxLayer, start: int, count: int) -> Iterator[tuple[str, int, Rows]]:
    """Where rows from ``start`` of BFL's weight go: (diffusers' module, its row, which of them)."""
    if layer.swapped:
        half = layer.rows // 2
        (target,) = layer.targets
        parts = [(target.module, half, half), (target.module, half, 0)]
    else:
        parts = [(target.module, target.rows, 0) for target in layer.targets]
    first = 0
    for module, rows, offset in parts:
        begin, end = max(start, first), min(start + count, first + rows)
        if begin < end:
            yield module, offset + begin - first, Rows(begin - start, end - start)
        first += rows
