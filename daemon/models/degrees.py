"""What ``auto`` means: the degrees of parallelism of one forward."""

from __future__ import annotations

from math import gcd
from typing import Literal

from ..ranks.parallel.config import ConfigError, ParallelConfig

Backend = Literal["nccl", "gloo"]
DeviceType = Literal["cuda", "cpu"]


def choose_degrees(
    *, heads: int, blocks: int, ranks: int, rows: int, backend: Backend, device_type: DeviceType
) -> ParallelConfig:
    """Degrees whose product is exactly ``ranks``, for ``rows`` rows in one forward.

    cfg is 2 where there are two rows and an even number of ranks: halves of a batch meet only at
    the end of a forward. Then ulysses, as large as the heads allow, then ring, which computes the
    same with more messages. Never pipefusion, which answers from earlier steps' activations.
    Raises ConfigError where nothing fits: over gloo, CUDA has no ring.
    """
    if ranks < 1 or rows < 1:
        raise ConfigError(f"{ranks} ranks and {rows} rows: at least one of each is needed")
    cfg = 2 if rows > 1 and ranks % 2 == 0 else 1
    sequence = ranks // cfg
    ulysses = gcd(sequence, heads)
    config = ParallelConfig(ulysses=ulysses, ring=sequence // ulysses, cfg=cfg)
    if config.ring > 1 and backend == "gloo" and device_type == "cuda":
        raise ConfigError(
            f"{ranks} ranks cannot share {heads} heads where ranks share a GPU: ring needs NCCL, "
            f"so ulysses alone would have to split {sequence} ways, and {sequence} does not divide "
            f"{heads}; use {_fitting(heads, ranks, cfg)} ranks, or give each rank a GPU of its own"
        )
    config.check_model(heads, blocks)
    config.check_transport(backend, device_type)
    config.check_world(ranks)
    return config


def _fitting(heads: int, ranks: int, cfg: int) -> int:
    """The most ranks below ``ranks`` that ulysses and cfg alone can use."""
    return cfg * max(n for n in range(1, max(2, ranks // cfg)) if heads % n == 0)
