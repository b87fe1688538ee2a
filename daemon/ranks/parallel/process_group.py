"""The process group of a rank group: no port reachable from outside, a deadline on everything."""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

# Both libraries make connections of their own. The ranks of a group share a host, so the loopback
# interface is enough, and nobody else can reach it.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# What travels is waited for, what is computed meanwhile is not.
_PROMPT = {"TORCH_NCCL_HIGH_PRIORITY": "1"}
# Names of the globals of xfuser's parallel_state that hold the groups of one config.
CONTEXT_GROUPS = ("_TP", "_SP", "_PP", "_CFG", "_DP", "_FS", "_DIT", "_VAE", "_MODEL_REPLICA")
# The groups of one rank alone, by rank and backend.
_alone: dict[tuple[int, str | None], Any] = {}


class RendezvousError(RuntimeError):
    """The ranks could not meet."""


@dataclass(frozen=True)
class RankGroup:
    """This rank's place among the ranks that it has joined."""

    rank: int
    world_size: int
    device: torch.device
    backend: str
    deadline: float  # seconds

    def most(self, number: int) -> int:
        """That of the rank with the largest one; all ranks call it. Raises RuntimeError."""
        if self.world_size == 1:
            return number
        device = self.device if self.backend == "nccl" else torch.device("cpu")
        most = torch.tensor([number], dtype=torch.int64, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def join(
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    backend: str,
    meeting_file: Path,
    deadline: float,
    patience: float | None = None,
) -> RankGroup:
    """Meet the other ranks; returns when all have come, or raises RendezvousError.

    ``meeting_file`` must not exist before the first rank comes and must lie in a directory that
    only this user can write. ``backend`` is "gloo" or "nccl". ``deadline`` (seconds) holds for
    the meeting and for every later exchange, until ``set_deadline``. ``patience`` (seconds) is for
    ranks that come later, if they may take longer. xfuser must be loaded.
    """
    if backend not in ("gloo", "nccl"):
        raise RendezvousError(f"backend {backend!r}: gloo and nccl are supported")
    _check_private(meeting_file.parent)
    os.environ.update(_LOOPBACK | _PROMPT)
    if device.type == "cuda":
        # Communicators bind to the current device, so it is set before there are any.
        torch.cuda.set_device(device)
    limit = timedelta(seconds=deadline)
    store = dist.FileStore(str(meeting_file), world_size)  # type: ignore[attr-defined]
    patience = deadline if patience is None else patience
    store.set_timeout(timedelta(seconds=patience))
    try:
        store.set(f"here-{rank}", "")
        store.wait([f"here-{other}" for other in range(world_size)])
        store.set_timeout(limit)
        dist.init_process_group(
            backend=backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        with groups_within(deadline):
            _make_world(world_size, device, backend)
    except RuntimeError as error:
        leave()
        raise RendezvousError(
            f"rank {rank} of {world_size} did not meet the others within {patience:g} s "
            f"({_first_line(error)}): restart the group with a new meeting file"
        ) from error
    return RankGroup(rank, world_size, device, backend, deadline)


def leave() -> None:
    """Destroy every process group. A no-op where there is none.

    After an exchange that failed under NCCL, end the process instead: this may wait for the GPU.
    """
    from xfuser.core.distributed import parallel_state, runtime_state

    for name in ("_WORLD", *CONTEXT_GROUPS):
        setattr(parallel_state, name, None)
    groups = sequence_groups()
    groups.ULYSSES_PG = groups.RING_PG = None
    runtime_state._RUNTIME = None
    _alone.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def set_deadline(seconds: float) -> None:
    """Give every process group that is alive a new deadline.

    For work that takes unusually long, as a first compilation does. All ranks set the same one.
    Under gloo it holds for collectives; a send or receive (PipeFusion) keeps the deadline that
    its group was made with.
    """
    limit = timedelta(seconds=seconds)
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(limit, group)


@contextlib.contextmanager
def groups_within(deadline: float) -> Iterator[None]:
    """Process groups made inside have a deadline (seconds) from the start.

    xfuser and yunchang give none to theirs, which means 30 minutes, for making them as well.
    Afterwards ``set_deadline`` alone would leave a rank that dies while groups are made unseen.

    They make dozens over a rank alone, in which nothing travels: that is one group here, because
    under gloo each has a thread that wakes up again and again.
    """
    original: Any = dist.new_group
    limit = timedelta(seconds=deadline)

    def new_group(ranks: Sequence[int] | None = None, *, backend: str | None = None) -> Any:
        if ranks is None or len(ranks) != 1:
            return original(ranks, limit, backend)
        # Every rank takes part in making a group, also of others: all remember it alike.
        key = (ranks[0], backend)
        if key not in _alone:
            _alone[key] = original(ranks, limit, backend)
        return _alone[key]

    replacement: Any = new_group
    dist.new_group = replacement
    try:
        yield
    finally:
        dist.new_group = original


def sequence_groups() -> Any:
    """yunchang's object with the groups of the active config, ULYSSES_PG and RING_PG."""
    return importlib.import_module("yunchang.globals").PROCESS_GROUP


def _make_world(world_size: int, device: torch.device, backend: str) -> None:
    # Not xfuser's init_distributed_environment: it takes the rank for the number of the GPU, and
    # ranks may share one.
    from xfuser.core.distributed import parallel_state

    parallel_state._WORLD = parallel_state.init_world_group(
        list(range(world_size)), device.index or 0, backend
    )


def _check_private(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise RendezvousError(f"no directory for the meeting file: {error}") from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RendezvousError(
            f"{directory} can be written by others, who could come as a rank: "
            "use a directory of mode 0700"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
