"""Whether there is room for what is about to be computed: asked first, and by all ranks alike."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...protocol.errors import OutOfMemory
from .parallel.process_group import RankGroup

_OPTIONS = (
    "a smaller picture or batch, an fp8 file, text encoders on the CPU, fewer resident components "
    "(`xdit-sidecar unload`), or more GPUs"
)


class Reservation:
    """Refuses work that would not fit, before a rank is half-way in it and the others wait.

    ``reserve``: bytes of each device that stay free for others.
    """

    def __init__(self, group: RankGroup, *, reserve: int, neighbours: int) -> None:
        """``neighbours``: ranks that work on the same device, this one included."""
        self._group = group
        self._reserve = reserve
        self._neighbours = neighbours
        self._withheld = 0  # bytes that torch holds and nobody else can have
        self._fitted = 0  # bytes that fitted since memory was given back; they are cached
        #: Called where room is short: frees what can be had again. The same on all ranks.
        self.give_up: Callable[[], None] = lambda: None

    def check(self, nbytes: int, what: str, *, alone: bool = False, lasting: int = 0) -> None:
        """Raise OutOfMemory, on every rank or on none, if ``nbytes`` cannot be had.

        ``what`` they are needed for, ``alone``: by rank 0 only, ``lasting``: how many of them are
        not free again afterwards. All ranks call it with the same numbers. Costs nothing while the
        ranks still hold as much from earlier work.
        """
        if nbytes > self._fitted:
            self._find(nbytes * (1 if alone else self._neighbours), what, _OPTIONS)
            if alone:
                return
            self._fitted = nbytes
        self._fitted -= lasting

    def check_lasting(self, nbytes: int, what: str, options: str) -> None:
        """Like :meth:`check` for what stays, of which each rank may need another number of bytes.

        ``options``: what the user can do where it does not fit.
        """
        if self._group.most(nbytes):
            self._find(nbytes * self._neighbours, what, options)
            self._fitted = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether as much can be had without freeing anything, on every rank; all of them ask."""
        return self._missing(nbytes * self._neighbours) <= 0

    def withhold(self, nbytes: int) -> None:
        """Count bytes as taken that torch takes for free memory of its own, or (< 0) no longer."""
        self._withheld += nbytes

    def trim(self) -> None:
        """Return cached device memory to the system."""
        self._fitted = 0
        if self._group.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _find(self, needed: int, what: str, options: str) -> None:
        if self._missing(needed) <= 0:
            return
        self.give_up()
        self.trim()
        if (missing := self._missing(needed)) > 0:
            raise OutOfMemory(
                f"{what} need about {needed} bytes on each device besides a reserve of "
                f"{self._reserve}, and {missing} are missing. Options: {options}"
            )

    def _missing(self, needed: int) -> int:
        return self._group.most(needed + self._reserve - self._free())

    def _free(self) -> int:
        """Bytes that this process can still have."""
        device = self._group.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return free + own - self._withheld
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return self._reserve
