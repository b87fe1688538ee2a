"""Scratch regions: memory that a session shares with the ranks, for one job at a time each."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from .. import limits
from .. import messages as m
from ..errors import Busy, OutOfMemory, RegionUnavailable
from ..manifest import round_up
from ..tensors import describe_tensor, view_placed
from ..version import ProtocolVersion

if TYPE_CHECKING:
    import torch

_SINCE = ProtocolVersion(1, 1)  # of daemons
_LEAST = 64 * limits.KIB  # of a latent: smaller ones travel as fast
_WIDEST = 4  # bytes of a number of an output
_GRANULE = limits.MIB
_PAUSE_SECONDS = 60.0  # after the daemon refused one


class Scratch:
    """One region, lent for one job."""

    def __init__(self, number: int, descriptor: int, nbytes: int) -> None:
        """Takes over ``descriptor``. Raises RegionUnavailable."""
        self.number = number
        try:
            self.memory = mmap.mmap(descriptor, nbytes)
        except (OSError, ValueError) as error:
            raise RegionUnavailable(f"mapping a scratch region failed: {error}") from None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap it: whatever still holds a frame that knew it, as an exception does."""
        with contextlib.suppress(BufferError):  # a view of it is left, which unmaps it in its time
            self.memory.close()

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.memory)

    def place(self, name: str, tensor: torch.Tensor) -> m.TensorPart:
        """Copy a tensor (any device) to the region's beginning; how a message tells of it."""
        part = describe_tensor(name, tensor, inline=False, offset=0)
        view_placed(self.memory, part).copy_(tensor.detach())
        return part


Opening = Callable[[m.OpenScratch], int]


class ScratchPool:
    """Those of one session. Each caller has one to itself while it waits.

    One whose job did not end as it should is not used again: the ranks may still be writing to it.
    """

    def __init__(self, daemon: ProtocolVersion) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._not_before = math.inf if daemon < _SINCE else 0.0
        self._idle: list[Scratch] = []
        self._unused: list[int] = []  # numbers of regions that the daemon may still have
        self._count = 0

    @contextlib.contextmanager
    def lend(self, nbytes: int, opening: Opening) -> Iterator[Scratch | None]:
        """A region of at least ``nbytes`` for the length of the block; None: send frames.

        ``opening`` asks the daemon for one and returns its descriptor. What it raises is passed
        on, but for Busy and OutOfMemory: then this session goes on without for a while.
        """
        if not nbytes or time.monotonic() < self._not_before:
            yield None
            return
        scratch = self._take(nbytes) or self._open(nbytes, opening)
        try:
            yield scratch
        except BaseException:
            if scratch is not None:
                scratch.close()
                self._give_up(scratch.number)
            raise
        if scratch is not None:
            with self._lock:
                if not self._closed:
                    self._idle.append(scratch)
                    return
            scratch.close()

    def close(self) -> None:
        """The session ended: unmap what is not in use, and later the rest."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()

    def _take(self, nbytes: int) -> Scratch | None:
        with self._lock:
            for scratch in self._idle:
                if scratch.nbytes >= nbytes:
                    self._idle.remove(scratch)
                    return scratch
            if self._idle:  # too small: another takes its place
                small = self._idle.pop()
                small.close()
                self._unused.append(small.number)
        return None

    def _open(self, nbytes: int, opening: Opening) -> Scratch | None:
        with self._lock:
            self._count += 1
            number = self._count
            instead_of = self._unused.pop() if self._unused else None
        size = round_up(nbytes, _GRANULE)
        try:
            descriptor = opening(m.OpenScratch(number=number, nbytes=size, instead_of=instead_of))
            return Scratch(number, descriptor, size)
        except (Busy, OutOfMemory):
            self._not_before = time.monotonic() + _PAUSE_SECONDS
            return None
        except BaseException:  # the daemon may have made it all the same
            self._give_up(number)
            raise

    def _give_up(self, number: int) -> None:
        with self._lock:
            self._unused.append(number)


def room_for(job: m.Job, tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a job's latents need in a scratch region; 0 if they travel as frames."""
    latent = tensors.get(m.IN_SCRATCH) if isinstance(job, m.Forward) else None
    if latent is None or latent.nbytes < _LEAST:
        return 0
    room = round_up(latent.nbytes, limits.SCRATCH_ALIGNMENT) + latent.numel() * _WIDEST
    return room if room <= limits.SCRATCH else 0
