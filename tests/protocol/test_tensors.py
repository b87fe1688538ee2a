"""Tensors as raw frames: the same bits on the other side, or a refusal."""

from __future__ import annotations

import gc

import msgspec
import pytest
import torch
from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol.errors import BadMessage
from xdit_sidecar.protocol.messages import TensorPart
from xdit_sidecar.protocol.tensors import (
    digest_tensor,
    pack_tensor,
    unpack_tensor,
    unpack_tensors,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator).abs() * 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 4), (1, 2, 3, 4, 5)])
def test_comes_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = some(*shape, dtype=dtype)
    part, (data,) = pack_tensor("x", tensor)
    assert part.nbytes == len(data) == tensor.nbytes
    sent = codec.decode(codec.encode(part), TensorPart, limit=1000)
    back = unpack_tensor(sent, iter([bytes(data)]))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[::2],
        lambda t: t[:, 1:3],
        lambda t: t[:1].expand(6, -1),
        lambda t: t.to(memory_format=torch.preserve_format)[None, None].contiguous(
            memory_format=torch.channels_last
        ),
    ],
)
def test_views_travel_as_what_they_show(view) -> None:
    shown = view(some(4, 6))
    part, frames = pack_tensor("x", shown)
    assert torch.equal(unpack_tensor(part, iter(frames)), shown)


def test_a_parameter_travels() -> None:
    part, frames = pack_tensor("x", torch.nn.Parameter(some(3)))
    assert torch.equal(unpack_tensor(part, iter(frames)), some(3))


def test_the_buffer_keeps_the_bytes_alive() -> None:
    part, frames = pack_tensor("x", some(1000, 100).T)
    gc.collect()
    ballast = [torch.full((1000, 100), 7.0) for _ in range(5)]
    assert torch.equal(unpack_tensor(part, iter(frames)), some(1000, 100).T)
    assert ballast


def test_what_is_unpacked_is_its_own() -> None:
    part, (data,) = pack_tensor("x", some(4))
    frame = bytearray(data)
    back = unpack_tensor(part, iter([memoryview(frame)]))
    frame[:] = bytes(len(frame))
    assert torch.equal(back, some(4))
    back.zero_()


def test_what_is_unpacked_without_a_copy_shows_its_frame() -> None:
    part, (data,) = pack_tensor("x", some(4, 3))
    frame = bytearray(data)
    shown = unpack_tensor(part, iter([memoryview(frame)]), copy=False)
    assert torch.equal(shown, some(4, 3))
    frame[:] = bytes(len(frame))
    assert not shown.any()


@pytest.mark.parametrize(
    "as_frame",
    [
        bytes,  # not to be written to
        lambda data: memoryview(bytearray(b"x" + data))[1:],  # not aligned
    ],
)
def test_what_cannot_be_shown_is_copied(as_frame) -> None:
    part, (data,) = pack_tensor("x", some(4, 3))
    back = unpack_tensor(part, iter([as_frame(bytes(data))]), copy=False)
    assert torch.equal(back, some(4, 3))
    assert back.data_ptr() % back.dtype.itemsize == 0


@pytest.mark.parametrize("change", [-1, 1, -16])
def test_too_few_or_many_bytes(change: int) -> None:
    part, (data,) = pack_tensor("x", some(4))
    frame = bytes(data)[: len(data) + change] + b"x" * change
    with pytest.raises(BadMessage, match=f"{len(frame)} bytes came, 16 expected"):
        unpack_tensor(part, iter([frame]))


@pytest.mark.parametrize("over", [-1, 0, 1, limits.BULK_FRAME])
def test_a_large_tensor_travels_in_several_frames(over: int) -> None:
    size = limits.BULK_FRAME + over
    tensor = torch.arange(251, dtype=torch.uint8).repeat(size // 251 + 1)[:size]
    part, frames = pack_tensor("x", tensor)
    assert [len(frame) for frame in frames[:-1]] == [limits.BULK_FRAME] * (part.frames - 1)
    assert len(frames) == part.frames == (1 if over <= 0 else 2)
    following, (data,) = pack_tensor("y", some(3))
    back = unpack_tensors([part, following], [*frames, data])
    assert torch.equal(back["x"], tensor)
    assert torch.equal(back["y"], some(3))
    with pytest.raises(BadMessage, match="more frames came"):
        unpack_tensors([part], [*frames, data])
    with pytest.raises(BadMessage, match="bytes came"):
        unpack_tensors([part, following], frames)


def test_a_shape_that_no_message_holds() -> None:
    part, frames = pack_tensor("x", some(4))
    huge = msgspec.structs.replace(part, shape=[2**31] * 8)
    with pytest.raises(BadMessage, match="16 bytes came"):
        unpack_tensor(huge, iter(frames))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int32, torch.float8_e4m3fn])
def test_dtypes_that_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(BadMessage, match="use one of F32"):
        pack_tensor("x", torch.zeros(2, dtype=dtype))


def test_a_digest_names_dtype_shape_and_contents() -> None:
    tensor = some(4, 6)
    others = [
        some(4, 6) + 1e-3,
        tensor.reshape(6, 4),
        tensor.view(torch.int64),
        tensor.bfloat16(),
        torch.zeros(4, 6),
        torch.zeros(0),
        torch.zeros(0, 3),
    ]
    digests = [digest_tensor(one) for one in [tensor, *others]]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {32}
    assert digest_tensor(tensor.T.contiguous().T) == digests[0]
