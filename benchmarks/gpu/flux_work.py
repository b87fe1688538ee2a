"""How much arithmetic one forward of a FLUX transformer is, and in which matrices. No torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

MLP_RATIO = 4


class Sizes(Protocol):
    """Of the model: heads and their size, blocks of both kinds."""

    @property
    def heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def double(self) -> int: ...
    @property
    def single(self) -> int: ...


class Multiplication(NamedTuple):
    """``count`` products of (rows, inner) with (inner, columns)."""

    count: int
    rows: int
    inner: int
    columns: int

    @property
    def flop(self) -> float:
        return 2.0 * self.count * self.rows * self.inner * self.columns


def list_multiplications(model: Sizes, image: int, text: int) -> list[Multiplication]:
    """Those of the blocks' linear layers, for so many tokens; what is left out is below 0.1 %."""
    width = model.heads * model.head_size
    mlp = MLP_RATIO * width
    found = []
    for tokens in (image, text):
        found += [
            Multiplication(model.double, tokens, width, 3 * width),
            Multiplication(model.double, tokens, width, width),
            Multiplication(model.double, tokens, width, mlp),
            Multiplication(model.double, tokens, mlp, width),
        ]
    both = image + text
    found += [
        Multiplication(model.single, both, width, 3 * width + mlp),
        Multiplication(model.single, both, width + mlp, width),
    ]
    return found


def attention_flop(model: Sizes, tokens: int) -> float:
    """Of the attention of all blocks: scores, and the values' sums."""
    return 4.0 * (model.double + model.single) * tokens**2 * model.heads * model.head_size
