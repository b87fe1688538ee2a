"""Scratch regions in a rank: what is read is copied, outputs lie behind the inputs."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from xdit_sidecar.daemon.ranks.scratch import MappedScratches
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import BadJob, Internal
from xdit_sidecar.protocol.regions.memfd import create_memfd
from xdit_sidecar.protocol.tensors import describe_tensor, unpack_tensors, view_placed

SIZE = 4096
CPU = torch.device("cpu")


class Owner:
    """A client's end of a region, and the rank's."""

    def __init__(self, nbytes: int = SIZE) -> None:
        self.scratches = MappedScratches()
        file = create_memfd(nbytes)
        self.memory = mmap.mmap(file, nbytes)
        grant = m.ScratchGrant(session="s1", number=1, nbytes=nbytes, descriptor=1)
        self.scratches.open(grant, file)

    def place(self, tensor: torch.Tensor, offset: int = 0) -> m.TensorPart:
        part = describe_tensor("x", tensor, inline=False, offset=offset)
        view_placed(self.memory, part).copy_(tensor)
        return part

    def job(self, *parts: m.TensorPart) -> m.Forward:
        return m.Forward(components={}, tensors=list(parts), scratch=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_input_is_a_copy(dtype: torch.dtype) -> None:
    owner = Owner()
    given = torch.randn(2, 3, 5).to(dtype)
    part = owner.place(given, offset=64)
    read = owner.scratches.read("s1", 1, part, CPU)
    owner.memory[:] = bytes(SIZE)
    assert torch.equal(read, given)


def test_outputs_lie_behind_the_inputs() -> None:
    owner = Owner()
    given = torch.randn(3, 5)
    part = owner.place(given)
    outputs = {"output": torch.randn(4, 4).T, "more": torch.arange(5.0).to(torch.bfloat16)}
    left = owner.scratches.write("s1", owner.job(part), outputs)
    assert left is not None
    assert [(p.inline, p.offset) for p in left] == [(False, 64), (False, 128)]
    found = unpack_tensors(left, [], owner.memory)
    assert found.keys() == outputs.keys()
    assert all(torch.equal(found[name], outputs[name]) for name in outputs)
    assert torch.equal(view_placed(owner.memory, part), given)


def test_outputs_without_room_are_not_left_there() -> None:
    owner = Owner()
    part = owner.place(torch.zeros(256))
    job = owner.job(part)
    before = bytes(owner.memory)
    assert owner.scratches.write("s1", job, {"output": torch.ones(769)}) is None
    assert bytes(owner.memory) == before
    assert owner.scratches.write("s1", job, {"output": torch.ones(768)}) is not None


def test_another_session_or_number_has_nothing() -> None:
    owner = Owner()
    part = owner.place(torch.zeros(4))
    for session, number in [("s2", 1), ("s1", 2), ("s1", None)]:
        with pytest.raises(Internal, match="not mapped"):
            owner.scratches.read(session, number, part, CPU)


def test_forgotten_ones_are_unmapped() -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as maps:
            return maps.read().count("memfd:xdit-sidecar")

    before = mapped()
    owner = Owner()
    assert mapped() == before + 2
    owner.scratches.forget(("s2", 1))
    owner.scratches.forget_session("s2")
    assert mapped() == before + 2
    owner.scratches.forget_session("s1")
    assert mapped() == before + 1
    with pytest.raises(Internal):
        owner.scratches.read("s1", 1, owner.place(torch.zeros(4)), CPU)


def test_what_cannot_be_mapped_is_the_jobs_fault() -> None:
    grant = m.ScratchGrant(session="s1", number=1, nbytes=limits.SCRATCH, descriptor=1)
    for file in (create_memfd(SIZE), os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(BadJob, match="cannot be mapped"):
            MappedScratches().open(grant, file)
        with pytest.raises(OSError):  # noqa: PT011  closed: EBADF
            os.fstat(file)
