"""The book of scratch regions: each belongs to one session, and all together are bounded."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest
from xdit_sidecar.daemon.broker import scratch as scratch_module
from xdit_sidecar.daemon.broker.scratch import ScratchRegions
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import BadMessage, Busy, OutOfMemory


@pytest.fixture
def regions() -> Iterator[ScratchRegions]:
    made = ScratchRegions()
    yield made
    made.close()


def open_one(regions: ScratchRegions, session: str, number: int, nbytes: int = limits.MIB) -> None:
    """Make one and forget the descriptor."""
    os.close(regions.open(session, number, nbytes))


def test_nobody_can_change_its_size_or_seal_it(regions: ScratchRegions) -> None:
    file = regions.open("s1", 1, limits.MIB)
    try:
        assert os.fstat(file).st_size == limits.MIB
        for length in (0, 2 * limits.MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(file, length)
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.pwrite(file, b"mine", 0) == 4
        assert os.pread(regions.find("s1", 1).file, 4, 0) == b"mine"
    finally:
        os.close(file)


def test_it_is_known_to_its_session_alone(regions: ScratchRegions) -> None:
    open_one(regions, "s1", 1)
    with pytest.raises(BadMessage, match="no scratch region 1"):
        regions.find("s2", 1)
    assert not regions.end("s2", 1)
    assert regions.find("s1", 1).nbytes == limits.MIB


def test_a_number_is_used_once_at_a_time(regions: ScratchRegions) -> None:
    open_one(regions, "s1", 1)
    with pytest.raises(BadMessage, match="open already"):
        regions.open("s1", 1, limits.MIB)
    regions.end("s1", 1)
    open_one(regions, "s1", 1)


def test_ended_ones_are_closed_and_told_of_where_ranks_map_them(regions: ScratchRegions) -> None:
    open_one(regions, "s1", 1)
    open_one(regions, "s1", 2)
    open_one(regions, "s2", 1)
    region = regions.find("s1", 2)
    region.ranks.add(0)
    assert not regions.end("s1", 1)
    assert regions.end("s1", 2)
    assert not regions.end("s1", 2)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(region.file)
    regions.end_session("s2")
    assert (len(regions), regions.nbytes) == (0, 0)


def test_lost_ranks_map_nothing(regions: ScratchRegions) -> None:
    open_one(regions, "s1", 1)
    regions.find("s1", 1).ranks.update((0, 1))
    regions.ranks_lost()
    assert not regions.end("s1", 1)


def test_one_session_has_so_many(regions: ScratchRegions) -> None:
    for number in range(limits.SCRATCHES_PER_SESSION):
        open_one(regions, "s1", number)
    with pytest.raises(Busy):
        regions.open("s1", 99, limits.MIB)
    open_one(regions, "s2", 99)


def test_all_sessions_together_have_so_many(regions: ScratchRegions) -> None:
    for number in range(limits.SCRATCHES):
        open_one(regions, f"s{number // limits.SCRATCHES_PER_SESSION}", number, 4096)
    with pytest.raises(Busy):
        regions.open("another", 1, 4096)


def test_all_together_have_so_many_bytes(regions: ScratchRegions) -> None:
    for number in range(limits.SCRATCH_BYTES // limits.SCRATCH):
        open_one(regions, f"s{number}", 1, limits.SCRATCH)
    with pytest.raises(Busy):
        regions.open("another", 1, 4096)
    regions.end_session("s0")
    open_one(regions, "another", 1, limits.SCRATCH)


def test_a_host_without_memory(regions: ScratchRegions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "available_host_memory", lambda: (4096, 1 << 30))
    with pytest.raises(OutOfMemory, match="4096 free"):
        regions.open("s1", 1, limits.MIB)
    assert len(regions) == 0
