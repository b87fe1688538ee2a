"""Rotary tables are computed once for positions that come again, and only then."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor
from xdit_sidecar.daemon.ranks.parallel import rotation
from xdit_sidecar.daemon.ranks.parallel.rotation import KeptRotations

AXES = [4, 6, 6]


class Counting(FluxPosEmbed):
    """The real one, which counts."""

    def __init__(self) -> None:
        super().__init__(theta=10_000, axes_dim=AXES)
        self.calls = 0

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().forward(ids)


def positions(rows: int, columns: int = 8) -> Tensor:
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def make() -> tuple[Counting, KeptRotations]:
    embed = Counting()
    return embed, KeptRotations(embed, torch.device("cpu"))


def test_the_same_positions_are_computed_once() -> None:
    embed, kept = make()
    for _ in range(3):
        for rows in (5, 6):
            found = kept(positions(rows))
            expected = FluxPosEmbed(theta=10_000, axes_dim=AXES)(positions(rows))
            assert all(map(torch.equal, found, expected))
    assert embed.calls == 2
    kept.forget()
    assert kept.nbytes == 0
    kept(positions(5))
    assert embed.calls == 3


def test_as_many_positions_elsewhere_are_others() -> None:
    embed, kept = make()
    one, other = kept(positions(4, 8)), kept(positions(8, 4))
    assert embed.calls == 2
    assert not torch.equal(one[0], other[0])
    moved = positions(4, 8) + 1
    assert torch.equal(kept(moved)[1], FluxPosEmbed(theta=10_000, axes_dim=AXES)(moved)[1])


@pytest.mark.parametrize("bound", ["_MOST", "_MOST_BYTES"])
def test_what_was_used_longest_ago_goes_first(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, kept = make()
    kept(positions(4))
    monkeypatch.setattr(rotation, bound, 2 * (1 if bound == "_MOST" else kept.nbytes))
    kept(positions(4, 7))
    kept(positions(4))
    kept(positions(4, 6))
    assert embed.calls == 3
    kept(positions(4))
    assert embed.calls == 3
    kept(positions(4, 7))
    assert embed.calls == 4
