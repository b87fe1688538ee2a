"""Scratch regions: host memory that one session shares with the ranks.

A job's latents lie there instead of passing through the broker. Its owner may write to one at any
time, so nothing that is decided by, or that must be the same for all ranks, is ever read from it.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field

from ...protocol import limits
from ...protocol.errors import BadMessage, Busy, OutOfMemory
from ...protocol.regions.memfd import available_host_memory, create_memfd


@dataclass(eq=False, slots=True)
class ScratchRegion:
    """One of them. The file is this process's own; others are sent duplicates."""

    session: str
    number: int  # the session's own name for it
    nbytes: int
    file: int = field(repr=False)
    ranks: set[int] = field(default_factory=set)  # that have it mapped, or are about to

    def duplicate(self) -> int:
        """A descriptor of its file, the caller's."""
        return os.dup(self.file)


class ScratchRegions:
    """All of them, by session; closed by :meth:`close`."""

    def __init__(self) -> None:
        self._regions: dict[tuple[str, int], ScratchRegion] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._regions)

    def open(self, session: str, number: int, nbytes: int) -> int:
        """Make a region: a descriptor of it, the caller's. Raises Busy, OutOfMemory, BadMessage."""
        if (session, number) in self._regions:
            raise BadMessage(f"the scratch region {number} of this session is open already")
        if (
            sum(owner == session for owner, _ in self._regions) >= limits.SCRATCHES_PER_SESSION
            or len(self) >= limits.SCRATCHES
            or self.nbytes + nbytes > limits.SCRATCH_BYTES
        ):
            raise Busy("there are too many scratch regions: send tensors as frames")
        free = available_host_memory()[0]
        if nbytes > free:
            raise OutOfMemory(f"{nbytes} bytes of host memory needed, {free} free")
        try:
            # Its owner may not seal it either: the ranks write to it.
            file = create_memfd(nbytes, fcntl.F_SEAL_SEAL, shown_as="xdit-scratch")
        except OSError as error:
            raise OutOfMemory(f"no scratch region could be made: {error}") from None
        region = ScratchRegion(session, number, nbytes, file)
        self._regions[session, number] = region
        self.nbytes += nbytes
        return region.duplicate()

    def find(self, session: str, number: int) -> ScratchRegion:
        """Raises BadMessage if the session has none of that number."""
        region = self._regions.get((session, number))
        if region is None:
            raise BadMessage(f"this session has no scratch region {number}")
        return region

    def end(self, session: str, number: int) -> bool:
        """Give one up, if it exists; whether ranks have it mapped."""
        region = self._regions.pop((session, number), None)
        if region is None:
            return False
        self.nbytes -= region.nbytes
        os.close(region.file)
        return bool(region.ranks)

    def end_session(self, session: str) -> None:
        """The session is gone, and with it all of its regions."""
        for owner, number in list(self._regions):
            if owner == session:
                self.end(owner, number)

    def ranks_lost(self) -> None:
        """Nobody has any of them mapped."""
        for region in self._regions.values():
            region.ranks.clear()

    def close(self) -> None:
        """Give up all."""
        for session, number in list(self._regions):
            self.end(session, number)
