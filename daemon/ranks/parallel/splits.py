"""Which tokens and which rows of a batch a rank works on. Plain arithmetic, no communication."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one stream (text or image) over ``ways`` ranks, exact for every length.

    Each rank owns ``shard`` consecutive tokens. The ``rest`` (length modulo ways, so fewer than
    ``ways``) is worked on by every rank. Nothing is padded, so nothing needs a mask.
    """

    length: int
    ways: int
    rank: int

    @property
    def shard(self) -> int:
        """Tokens that each rank owns."""
        return self.length // self.ways

    @property
    def rest(self) -> int:
        """Tokens that all ranks work on: the last ones."""
        return self.length % self.ways

    def take(self, tokens: Tensor, dim: int) -> Tensor:
        """This rank's part along ``dim``: its shard, then the rest."""
        if self.ways == 1:
            return tokens
        own = tokens.narrow(dim, self.rank * self.shard, self.shard)
        shared = tokens.narrow(dim, self.ways * self.shard, self.rest)
        return torch.cat([own, shared], dim)


@dataclass(frozen=True)
class BatchSplit:
    """The rows of a batch over ``ways`` ranks.

    Every rank takes ⌈rows / ways⌉ rows. Where that is more than there are, the last rank's rows
    begin earlier and some row is computed twice, with equal results: a batch of 3 over 2 ranks
    is rows 0 1 and 1 2. So all ranks have the same number of rows, in the time that the longest
    uneven piece would take.
    """

    rows: int
    ways: int

    @property
    def piece(self) -> int:
        """Rows per rank."""
        return -(-self.rows // self.ways)

    def start(self, rank: int) -> int:
        """The first row of ``rank``."""
        return min(rank * self.piece, self.rows - self.piece)

    def take(self, tensor: Tensor | None, rank: int) -> Tensor | None:
        """The rows of ``rank``; a scalar or a single row that stands for all is left as it is."""
        if tensor is None or tensor.ndim == 0 or tensor.shape[0] != self.rows:
            return tensor
        return tensor.narrow(0, self.start(rank), self.piece)

    def join(self, pieces: Tensor) -> Tensor:
        """From the pieces of all ranks one after another, (ways × piece, …), the batch."""
        kept = []
        for rank in range(self.ways):
            # What an earlier rank has already given is left out.
            first = max(0, rank * self.piece - self.start(rank))
            at = rank * self.piece
            kept.append(pieces[at + first : at + self.piece])
        return torch.cat(kept)


def even_ranges(length: int, parts: int) -> list[tuple[int, int]]:
    """``parts`` consecutive ranges over ``length``, the longer ones first, lengths ±1."""
    size, longer = divmod(length, parts)
    bounds = [part * size + min(part, longer) for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))
