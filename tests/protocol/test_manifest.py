"""Where tensors lie, and tables that make no sense."""

from __future__ import annotations

import itertools

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol.errors import BadMessage
from xdit_sidecar.protocol.manifest import (
    DTYPE_BYTES,
    Manifest,
    TensorSpec,
    check_manifest,
    lay_out,
    region_bytes,
)

dtypes = st.sampled_from(sorted(DTYPE_BYTES))
shapes = st.lists(st.integers(0, 40), max_size=4)


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    return [
        TensorSpec(f"t{i}", draw(dtypes), draw(shapes)) for i in range(draw(st.integers(1, 12)))
    ]


@given(specs())
def test_layout_is_aligned_and_nothing_overlaps(tensors: list[TensorSpec]) -> None:
    placed = lay_out(tensors)
    check_manifest(placed)
    assert [t.name for t in placed] == [t.name for t in tensors]
    assert all(t.offset % limits.TENSOR_ALIGNMENT == 0 for t in placed)
    for one, next_one in itertools.pairwise(placed):
        assert one.offset + one.nbytes <= next_one.offset
    size = region_bytes(placed)
    assert size > 0
    assert size % limits.REGION_GRANULE == 0
    end = max(t.offset + t.nbytes for t in placed)
    assert end <= size < end + 2 * limits.REGION_GRANULE


@given(specs())
def test_aliases_share_their_bytes_and_cost_nothing(tensors: list[TensorSpec]) -> None:
    alias = TensorSpec("alias", tensors[0].dtype, tensors[0].shape)
    placed = {t.name: t for t in lay_out([*tensors, alias], {"alias": "t0"})}
    assert placed["alias"].offset == placed["t0"].offset
    assert region_bytes(placed.values()) == region_bytes(lay_out(tensors))
    after = lay_out([tensors[0], alias, *tensors[1:]], {"alias": "t0"})
    assert region_bytes(after) == region_bytes(lay_out(tensors))


@given(st.permutations([0, 1, 2, 3]), st.lists(st.integers(0, 5), min_size=4, max_size=4), dtypes)
def test_strided_extents_agree_with_torch(order: list[int], shape: list[int], dtype: str) -> None:
    tensor = torch.empty(shape).permute(*order)
    spec = TensorSpec("t", dtype, list(tensor.shape), 0, list(tensor.stride()))
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    elements = 0 if not tensor.numel() else last + 1
    assert spec.nbytes == elements * DTYPE_BYTES[dtype]


def test_extents_by_hand() -> None:
    assert TensorSpec("scalar", "F32", []).nbytes == 4
    assert TensorSpec("scalar", "F32", [], 0, []).nbytes == 4
    assert TensorSpec("empty", "F32", [0, 4], 0, [4, 1]).nbytes == 0
    assert TensorSpec("gaps", "BF16", [2, 3], 0, [100, 2]).nbytes == (100 + 4 + 1) * 2
    assert TensorSpec("expanded", "F64", [1000], 0, [0]).nbytes == 8
    assert region_bytes([]) == limits.REGION_GRANULE
    granule = TensorSpec("a", "U8", [limits.REGION_GRANULE])
    assert region_bytes([granule]) == limits.REGION_GRANULE
    one_more = TensorSpec("a", "U8", [limits.REGION_GRANULE + 1])
    assert region_bytes([one_more]) == 2 * limits.REGION_GRANULE


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ([TensorSpec("w", "F99", [1])], "dtype"),
        ([TensorSpec("w", "", [1])], "dtype"),
        ([TensorSpec("w", "U8", [1]), TensorSpec("w", "U8", [1])], "twice"),
        ([TensorSpec("w", "U8", [1, 1], 0, [1])], "rank"),
        ([TensorSpec("w", "F32", [1], 2)], "offset"),
        ([TensorSpec("w", "F64", [1], 4)], "offset"),
        ([TensorSpec("w", "U8", [1], limits.REGION)], "beyond"),
        ([TensorSpec("w", "U8", [limits.REGION + 1])], "beyond"),
        ([TensorSpec("w", "F64", [limits.REGION] * limits.DIMENSIONS)], "beyond"),
        ([TensorSpec("w", "U8", [2], 0, [limits.REGION])], "beyond"),
    ],
)
def test_tables_that_make_no_sense(tensors: list[TensorSpec], what: str) -> None:
    with pytest.raises(BadMessage, match=what) as refused:
        check_manifest([TensorSpec("fine", "U8", [1]), *tensors])
    assert "'w'" in str(refused.value)


def test_overlap_is_legal_because_weights_may_be_tied() -> None:
    check_manifest([TensorSpec("a", "F32", [4]), TensorSpec("b", "F32", [2], 8)])


@pytest.mark.parametrize(
    "tensor",
    [
        ["", "F32", [1]],
        ["x" * (limits.NAME + 1), "F32", [1]],
        ["line\n", "F32", [1]],
        ["größe", "F32", [1]],
        ["w", "F32", [-1]],
        ["w", "F32", [1] * (limits.DIMENSIONS + 1)],
        ["w", "F32", [limits.REGION + 1]],
        ["w", "F32", [1], -4],
        ["w", "F32", [1], 0, [-1]],
        ["w", "F32", [1.5]],
        ["w", "F32", "1"],
        ["w", "F32"],
        {"name": "w", "dtype": "F32", "shape": [1]},
    ],
)
def test_tables_that_are_not_even_decoded(tensor: object) -> None:
    with pytest.raises(BadMessage):
        codec.decode(msgpack.packb([tensor]), Manifest, limit=limits.CONTROL_FRAME)


def test_a_table_has_at_least_one_tensor_and_not_too_many() -> None:
    for count in (0, limits.TENSORS + 1):
        table = [[str(i), "U8", [1]] for i in range(count)]
        with pytest.raises(BadMessage):
            codec.decode(msgpack.packb(table), Manifest, limit=limits.CONTROL_FRAME)
