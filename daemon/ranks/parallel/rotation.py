"""FLUX's rotary tables, kept for positions that are given again, as in all steps of a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # sets of positions: sizes and text lengths that take turns
_MOST_BYTES = 64 * 2**20  # of their tables

Tables = tuple[Tensor, Tensor]  # cosines and sines


class KeptRotations(torch.nn.Module):
    """In the place of a diffusers ``FluxPosEmbed``; its tables, on ``device``, bit for bit.

    Positions are given in host memory, where comparing them with known ones waits for no GPU.
    """

    def __init__(self, embed: Any, device: torch.device) -> None:
        super().__init__()
        self._embed = embed
        self._device = device
        self._kept: list[tuple[Tensor, Tables]] = []  # the last used first
        self._fixed: Tables | None = None

    def forward(self, ids: Tensor) -> Tables:
        """The tables, (tokens, head size) each in fp32, for positions (tokens, 3)."""
        if self._fixed is not None:
            return self._fixed
        for number, (known, found) in enumerate(self._kept):
            if torch.equal(known, ids):
                self._kept.insert(0, self._kept.pop(number))
                return found
        tables: Tables = self._embed(ids.to(self._device))
        self._kept.insert(0, (ids, tables))
        while len(self._kept) > _MOST or self.nbytes > _MOST_BYTES:
            self._kept.pop()
        return tables

    @contextmanager
    def fixed(self, tables: Tables) -> Iterator[None]:
        """These are the tables meanwhile, whatever the positions."""
        self._fixed = tables
        try:
            yield
        finally:
            self._fixed = None

    @property
    def nbytes(self) -> int:
        """Of the tables that are kept, on the device."""
        return sum(table.nbytes for _, tables in self._kept for table in tables)

    def forget(self) -> None:
        """Keep none."""
        self._kept.clear()
