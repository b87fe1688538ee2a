"""Whether there is room for what is about to be computed: asked first, and by all ranks alike."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ...protocol.errors import OutOfMemory
from .parallel.process_group import RankGroup


class Reservation:
    """Refuses work that would not fit, before a rank is half-way in it and the others wait.

    ``reserve``: bytes of each device that stay free for others.
    """

    def __init__(self, group: RankGroup, *, reserve: int, neighbours: int) -> None:
        """``neighbours``: ranks that work on the same device, this one included."""
        self._group = group
        self._reserve = reserve
        self._neighbours = neighbours
        self._fitted = 0  # bytes that fitted since memory was given back; they are cached

    def check(self, nbytes: int, what: str, *, alone: bool = False) -> None:
        """Raise OutOfMemory, on every rank or on none, if ``nbytes`` cannot be had.

        ``what`` they are needed for, ``alone``: by rank 0 only. All ranks call it with the same
        numbers. Costs nothing while the ranks still hold as much from earlier work.
        """
        if nbytes <= self._fitted:
            return
        needed = nbytes * (1 if alone else self._neighbours)
        missing = self._most(needed + self._reserve - self._free())
        if missing <= 0:
            self._fitted = nbytes if not alone else self._fitted
            return
        raise OutOfMemory(
            f"{what} need about {needed} bytes on each device besides a reserve of "
            f"{self._reserve}, and {missing} are missing. "
            "Options: a smaller picture or batch, an fp8 file, text encoders on the CPU, fewer "
            "resident components (`xdit-sidecar unload`), or more GPUs"
        )

    def trim(self) -> None:
        """Return cached device memory to the system."""
        self._fitted = 0
        if self._group.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _free(self) -> int:
        """Bytes that this process can still have."""
        device = self._group.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return self._reserve

    def _most(self, missing: int) -> int:
        """What the rank that is worst off misses."""
        if self._group.world_size == 1:
            return missing
        device = self._group.device if self._group.backend == "nccl" else torch.device("cpu")
        worst = torch.tensor([missing], dtype=torch.int64, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return int(worst)
