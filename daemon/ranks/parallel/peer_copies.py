"""The ranks of a group on GPUs of their own: what they share to exchange by copies.

Memory is made when the first forward comes that needs as much, opened by the others by CUDA IPC,
and proves itself before anything is entrusted to it.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....protocol.regions.cuda_driver import (
    IPC_HANDLE_BYTES,
    CudaDriver,
    CudaError,
    CudaUnavailable,
)
from .copied_heads import CopiedHeads
from .lanes import CudaLanes, Lanes
from .shared_places import CLEAR, MOST_WAYS, PLACES, SET, SharedPlaces
from .ulysses import Attend

_PROOF_BYTES = 1 << 20
_SMALLEST = 64 << 10  # bytes of a place


class _Verdict(enum.IntEnum):
    """On memory that was made; that of a group is its worst."""

    FIT = 0
    NO_ROOM = 1  # another time
    UNFIT = 2  # never


class PeerCopies:
    """Exchanges of the ranks of ``group``, each on a GPU of its own, all of one host.

    All of them call :meth:`heads` and :meth:`close` with the same arguments, in the same order.
    """

    def __init__(
        self,
        driver: CudaDriver,
        ordinal: int,
        device: torch.device,
        lanes: Lanes,
        group: Any,
        patience: float,
    ) -> None:
        """``ordinal``: of the GPU; ``device``: of tensors, which ``group`` gathers too;
        ``patience``: seconds that a proof may take."""
        self._device = device
        self._group = group
        self._patience = patience
        self._rank = dist.get_rank(group)
        self._ways = dist.get_world_size(group)
        self._make = partial(SharedPlaces, driver, ordinal, device, lanes, self._rank, self._ways)
        self._made: list[SharedPlaces] = []  # each larger than the one before
        self._proven = False
        self._verdict = _Verdict.FIT
        self._reason = ""  # this rank's own, for another verdict
        self._last: CopiedHeads | None = None

    @classmethod
    def on_gpu(cls, device: torch.device, patience: float, group: Any) -> PeerCopies:
        """Those of a rank on that GPU. Raises CudaUnavailable."""
        if dist.get_world_size(group) > MOST_WAYS:
            raise CudaUnavailable(f"at most {MOST_WAYS} ranks can share a forward by copies")
        driver = CudaDriver.load()
        if not driver.has_stream_values:
            raise CudaUnavailable("the driver is too old: CUDA 11.7 or later is needed")
        return cls(driver, device.index or 0, device, CudaLanes(device), group, patience)

    def heads(self, nbytes: int, attend: Attend) -> CopiedHeads | None:
        """The exchange of one forward, whose packed tensors have at most as many bytes.

        None, and :attr:`refusal` says why, where there is none: one rank has no memory (until
        :meth:`close`), cannot open another's, or is not reached by it. Raises RuntimeError if a
        rank stays away, and if the forward before was given up in the middle, as flags may be left
        of it.
        """
        if self._last is not None and self._last.unfinished:
            raise RuntimeError("an exchange was given up in the middle: ranks must begin anew")
        fitting = [places for places in self._made if places.capacity >= nbytes]
        if not fitting and self._verdict is _Verdict.FIT and self._add(nbytes):
            fitting = self._made[-1:]
        self._last = CopiedHeads(fitting[0], attend) if fitting else None
        return self._last

    def close(self) -> None:
        """Free all memory; what there was no room for is tried again.

        No recording of an exchange may be left.
        """
        if self._verdict is _Verdict.NO_ROOM:
            self._verdict = _Verdict.FIT
        self._last = None
        made, self._made = self._made, []
        if made:
            self._release(made)

    @property
    def refusal(self) -> str | None:
        """Why there is no exchange for what is larger than before, or at all."""
        if self._verdict is _Verdict.FIT:
            return None
        return self._reason or "another rank cannot, and says why"

    @property
    def nbytes(self) -> int:
        """Of device memory that is held."""
        return sum(places.nbytes for places in self._made)

    def _add(self, nbytes: int) -> bool:
        places, handle = self._allocate(_round_up(nbytes))
        handles = self._gather(handle)
        mine = _Verdict.NO_ROOM
        if places is not None:
            mine = self._judge(self._open, places, handles) if any(handle) else _Verdict.UNFIT
        verdict = self._worst(mine)
        if verdict is _Verdict.FIT and places is not None and not self._proven:
            verdict = self._worst(self._judge(self._prove, places))
        if verdict is _Verdict.FIT and places is not None:
            self._proven = True
            self._made.append(places)
            return True
        self._release([] if places is None else [places])
        self._verdict = verdict
        return False

    def _allocate(self, capacity: int) -> tuple[SharedPlaces | None, bytes]:
        """With a handle of zeros where there is none."""
        no_handle = bytes(IPC_HANDLE_BYTES)
        try:
            places = self._allocate_at_last(capacity)
        except CudaError as error:
            self._reason = str(error)
            return None, no_handle
        try:
            return places, places.export()
        except CudaError as error:
            self._reason = str(error)
            return places, no_handle

    def _allocate_at_last(self, capacity: int) -> SharedPlaces:
        try:
            return self._make(capacity)
        except CudaError:
            if self._device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # torch may keep what nobody uses
            return self._make(capacity)

    def _judge(self, accept: Callable[..., bool], *arguments: object) -> _Verdict:
        """What a step comes to that asks nothing of other ranks; RuntimeError is torch's."""
        try:
            return _Verdict.FIT if accept(*arguments) else _Verdict.UNFIT
        except (CudaError, RuntimeError) as error:
            self._reason = str(error)
            full = isinstance(error, torch.OutOfMemoryError)
            return _Verdict.NO_ROOM if full else _Verdict.UNFIT

    def _open(self, places: SharedPlaces, handles: Sequence[bytes]) -> bool:
        for peer, handle in enumerate(handles):
            if peer != self._rank and any(handle):
                places.open(peer, handle)
        return True

    def _prove(self, places: SharedPlaces) -> bool:
        """Whether what is sent comes as it is: some boards only say that they reach each other."""
        nbytes = min(_PROOF_BYTES, places.capacity // self._ways)
        everybody = range(self._ways)
        senders = [peer for peer in everybody if peer != self._rank]
        end = time.monotonic() + self._patience
        for number in range(PLACES):
            sent = [self._pattern(self._rank, peer, number, nbytes) for peer in everybody]
            packed = torch.stack(sent)
            place = places.send(number, packed)
            if not all(self._sees_flag(places, number, peer, end) for peer in senders):
                return False
            places.receive([number])
            del packed  # it was read until then
            for peer in everybody:
                if not torch.equal(place[peer], self._pattern(peer, self._rank, number, nbytes)):
                    self._reason = f"what {self._name(peer)} sends comes as something else"
                    return False
        return True

    def _sees_flag(self, places: SharedPlaces, number: int, peer: int, end: float) -> bool:
        """By the host, which can give up."""
        while (found := places.look(number, peer)) == CLEAR:
            if time.monotonic() > end:
                self._reason = f"what {self._name(peer)} sends does not come"
                return False
            time.sleep(0.001)
        if found != SET:
            self._reason = f"what {self._name(peer)} sends comes as something else"
        return found == SET

    def _pattern(self, sender: int, receiver: int, number: int, nbytes: int) -> Tensor:
        """(nbytes,) uint8 that everybody knows."""
        seed = (sender * MOST_WAYS + receiver) * PLACES + number
        offsets = torch.arange(nbytes, dtype=torch.int32, device=self._device)
        return (offsets * 40503 + seed * 9973 >> 5 & 255).to(torch.uint8)

    def _name(self, peer: int) -> str:
        return f"rank {dist.get_global_rank(self._group, peer)}"

    def _release(self, made: Sequence[SharedPlaces]) -> None:
        """Free them, once nobody has them open; all ranks together."""
        for places in made:
            places.close_others()
        self._worst(_Verdict.FIT)
        for places in made:
            places.free()

    def _worst(self, verdict: _Verdict) -> _Verdict:
        return _Verdict(max(found for (found,) in self._gather(bytes([verdict]))))

    def _gather(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, as many each."""
        own = torch.tensor(list(data), dtype=torch.uint8, device=self._device)
        others = [torch.empty_like(own) for _ in range(self._ways)]
        dist.all_gather(others, own, group=self._group)
        return [bytes(other.tolist()) for other in others]


def _round_up(nbytes: int) -> int:
    """By an eighth at most, so that few sizes make few buffers."""
    step = max(_SMALLEST, 1 << nbytes.bit_length() >> 4)
    return -(-nbytes // step) * step
