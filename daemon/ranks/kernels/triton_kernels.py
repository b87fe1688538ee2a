"""The kernels for GPUs, in Triton. Only to be imported where Triton is installed.

They give what :mod:`.plain` gives: in fp32, rounded where its steps round; sums of squares add up
in another order. Launched on the current device, which is the tensors'.
"""

# Triton reads the kernels as they are written: without types, constants in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .plain import Projected

# Of a program. With 128 columns of a head 1024 elements, 8 of a thread: no other sizes were faster
# by more than a tenth on an H200.
_TOKENS = 1
_HEADS = 8
_COLUMNS = 2048


def rotate_heads(
    streams: Sequence[Projected], cosines: Tensor, sines: Tensor, ways: int, eps: float
) -> Tensor:
    """See `plain.rotate_heads`; D is even."""
    batch, _, width = streams[0].tokens.shape
    (size,) = streams[0].weight.shape
    heads = width // size
    total = sum(tokens.shape[1] for tokens, _ in streams)
    packed = streams[0].tokens.new_empty(ways, batch, total, heads // ways, size)
    first = 0
    for tokens, weight in streams:
        count = tokens.shape[1]
        if batch and count:
            _rotate_heads[triton.cdiv(count, _TOKENS), triton.cdiv(heads, _HEADS), batch](
                tokens.contiguous(),
                weight.contiguous(),
                cosines.contiguous(),
                sines.contiguous(),
                packed,
                count,
                total,
                first,
                heads,
                heads // ways,
                eps,
                SIZE=size,
                PADDED=triton.next_power_of_2(size),
                TOKENS=_TOKENS,
                HEADS=_HEADS,
                enable_fp_fusion=False,
            )
        first += count
    return packed


def activate_into(joined: Tensor, inner: Tensor, start: int) -> None:
    """See `plain.activate_into`."""
    if not inner.numel():
        return
    columns = inner.shape[-1]
    grid = inner.numel() // columns, triton.cdiv(columns, _COLUMNS)
    _activate_into[grid](
        inner.contiguous(), joined, columns, joined.shape[-1], start, COLUMNS=_COLUMNS
    )


@triton.jit(do_not_specialize=["count", "total", "first"])
def _rotate_heads(
    tokens,
    weight,
    cosines,
    sines,
    packed,
    count,
    total,
    first,
    heads,
    own,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    PAIRS: tl.constexpr = PADDED // 2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = (token < count)[:, None, None] & (head < heads)[None, :, None]
    inside = inside & (column < SIZE)[None, None, :]

    source = ((row * count + token)[:, None] * heads + head[None, :]) * SIZE
    given = tl.load(tokens + source[:, :, None] + column[None, None, :], mask=inside, other=0.0)
    values = given.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=2) / SIZE + eps)
    gain = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    normed = (values * scale[:, :, None] * gain[None, None, :]).to(given.dtype).to(tl.float32)

    place = (first + token)[:, None] * SIZE + column[None, :]
    known = (token < count)[:, None] & (column < SIZE)[None, :]
    cosine = tl.load(cosines + place, mask=known, other=0.0)
    sine = tl.load(sines + place, mask=known, other=0.0)
    real, imaginary = tl.split(tl.reshape(normed, (TOKENS, HEADS, PAIRS, 2)))
    real_cosine, imaginary_cosine = tl.split(tl.reshape(cosine, (TOKENS, 1, PAIRS, 2)))
    real_sine, imaginary_sine = tl.split(tl.reshape(sine, (TOKENS, 1, PAIRS, 2)))
    turned = tl.join(
        real * real_cosine - imaginary * real_sine,
        imaginary * imaginary_cosine + real * imaginary_sine,
    )

    rank, place_of_rank = head // own, head % own
    begin = (rank * tl.num_programs(2) + row) * total  # of the rank's part
    target = (begin[None, :] + first + token[:, None]) * own + place_of_rank[None, :]
    tl.store(
        packed + target[:, :, None] * SIZE + column[None, None, :],
        tl.reshape(turned, (TOKENS, HEADS, PADDED)).to(given.dtype),
        mask=inside,
    )


@triton.jit
def _activate_into(inner, joined, columns, width, start, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    given = tl.load(inner + row * columns + column, mask=inside, other=0.0)
    x = given.to(tl.float32)
    # x / 2 · (1 + tanh u) is x · sigmoid(2 u).
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x * tl.sigmoid(2 * u)
    tl.store(joined + row * width + start + column, y.to(given.dtype), mask=inside)
