"""Low-rank branches beside linear layers, eagerly and in compiled code.

Compiled code calls an operator behind every linear layer that finds by the layer's weight what is
to be added. So there is one piece of code whatever is added to which layers, and what is added is
computed as it is eagerly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..operators import define_operator


class Branch(NamedTuple):
    """Adds ``scale · (x @ down.T) @ up.T`` to a layer's outputs from ``start`` on.

    ``down`` is [rank, in], ``up`` [rows, rank].
    """

    start: int
    down: Tensor
    up: Tensor
    scale: float


#: What is added to layers, by the addresses of their weights.
Added = Mapping[int, tuple[Branch, ...]]

_current: list[Added] = [{}]  # the last one; ranks compute in one thread


@contextmanager
def adding(layers: Iterable[nn.Linear], added: Added) -> Iterator[None]:
    """Within it the layers' outputs have the branches added, to those of an outer one.

    ``layers``: all of a model's that compiled code may run through, with branches or without.
    """
    before = _current[-1]
    plain: list[tuple[nn.Linear, type]] = [
        (layer, type(layer)) for layer in layers if not isinstance(layer, _Branched)
    ]
    _current.append({**before, **{at: before.get(at, ()) + own for at, own in added.items()}})
    try:
        for layer, kind in plain:
            _become(layer, _branched(kind))
        yield
    finally:
        for layer, kind in plain:
            _become(layer, kind)
        _current.pop()


class _Branched(nn.Linear):
    """What a linear layer of any kind is while there are branches."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input).contiguous()  # new memory, so it can be added to in place
        if torch.compiler.is_compiling():
            torch.ops.xdit_sidecar.add_branches(output, input, self.weight)
        else:
            _add(output, input, self.weight)
        return output


@cache
def _branched(kind: type) -> type:
    return type(f"Branched{kind.__name__}", (_Branched, kind), {})


def _become(layer: nn.Linear, kind: type) -> None:
    object.__setattr__(layer, "__class__", kind)  # the module's own takes ten times as long


def _add(output: Tensor, given: Tensor, weight: Tensor) -> None:
    branches = _current[-1].get(weight.data_ptr(), ())
    if not branches:
        return
    rows = output.view(-1, output.shape[-1])
    given = given.reshape(-1, given.shape[-1])
    for start, down, up, scale in branches:
        inner = given @ down.to(given.dtype).T
        part = rows[:, start : start + up.shape[0]]
        # One kernel that sums in fp32: the product alone is never rounded to the output dtype.
        part.addmm_(inner, up.to(given.dtype).T, alpha=scale)


define_operator("add_branches(Tensor(a!) output, Tensor given, Tensor weight) -> ()", _add)
