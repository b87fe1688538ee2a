"""Exchanges as operators: what they give, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from xdit_sidecar.daemon.ranks.parallel.attention import LocalExchange
from xdit_sidecar.daemon.ranks.parallel.opaque_exchange import OpaqueExchange, exchanging
from xdit_sidecar.daemon.ranks.parallel.ulysses import pack, unpack, unpack_copy
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

OPERATORS = torch.ops.xdit_sidecar
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in xfuser's


@pytest.fixture(autouse=True)
def _kernels() -> None:
    load_xfuser(torch.device("cpu"))


def tokens(rows: int, count: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(rows, count, heads, size, generator=generator).to(dtype)


@given(
    rows=st.integers(1, 3),
    count=st.integers(1, 9),
    ways=st.integers(1, 4),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    room=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_packing_is_undone(
    rows: int, count: int, ways: int, heads: int, size: int, room: int, dtype: torch.dtype
) -> None:
    given_tokens = tokens(rows, count, ways * heads, size, dtype)
    packed = pack(given_tokens, ways)
    assert packed.shape == (ways, rows, count, heads, size)
    assert torch.equal(packed[-1], given_tokens[:, :, -heads:])
    assert torch.equal(unpack(packed), given_tokens)
    copied = unpack_copy(packed, room)
    width = copied.shape[-1] - room
    assert torch.equal(copied[..., :width], given_tokens.flatten(2))
    assert copied.data_ptr() != packed.data_ptr()


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_alone_a_rank_attends_to_its_own(ways: int) -> None:
    query, key, value = (tokens(2, n + 5, 4, 8, torch.float32)[:, :5] for n in range(3))
    expected = LocalExchange().attend(query, key, value)
    exchange = OpaqueExchange(ways)
    assert torch.equal(exchange.attend(query, key, value), expected)
    with exchanging(LocalExchange()) as use:
        assert torch.equal(exchange.attend(query, key, value), expected)
    assert use.count == 1


@pytest.mark.parametrize("part", range(3))
def test_what_is_sent_must_be_kept(part: int) -> None:
    """A compiler that gives a copy on has given up what is read by other ranks."""
    with exchanging(LocalExchange()):
        sent, before = [], None
        for n in range(3):
            packed = pack(tokens(1, n + 5, 4, 8, torch.float32)[:, :5], 2)
            before = OPERATORS.exchange_send(packed, before, packed)
            sent.append([packed, before])
        sent[part][0] = sent[part][0].clone()
        with pytest.raises(RuntimeError, match="before it has arrived"):
            OPERATORS.exchange_attend(*sent[0], *sent[1], *sent[2])


def test_operators_are_described_as_they_are() -> None:
    """Shapes for compilers, and what is said to change."""
    packed = pack(tokens(1, 6, 4, 8, torch.float32), 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS.exchange_receive.default, (packed, None, 0), test_utils=checks)
    with exchanging(LocalExchange()):
        arguments = (packed, None, packed.clone(), packed.clone())
        torch.library.opcheck(
            OPERATORS.exchange_send.default, arguments, test_utils="test_faketensor"
        )
