"""Streams on which copies to other ranks go, beside the one on which is computed."""

from __future__ import annotations

from typing import Protocol

import torch


class Lanes(Protocol):
    """Streams of a rank's device: one on which it computes, and one for copies to each rank."""

    @property
    def main(self) -> int:
        """The stream on which is computed."""
        ...

    def fork(self, peer: int) -> int:
        """The stream of copies to a rank, which goes on after what was computed so far."""
        ...

    def join(self) -> None:
        """Have what is computed next wait for all copies."""
        ...


class CudaLanes:
    """`Lanes` of torch's streams, which recordings follow."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._forked: dict[int, torch.cuda.Stream] = {}

    @property
    def main(self) -> int:
        """See `Lanes.main`."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def fork(self, peer: int) -> int:
        """See `Lanes.fork`."""
        if peer not in self._streams:
            self._streams[peer] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._forked[peer] = self._streams[peer]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return int(stream.cuda_stream)

    def join(self) -> None:
        """See `Lanes.join`."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._forked.values():
            current.wait_stream(stream)
        self._forked.clear()
