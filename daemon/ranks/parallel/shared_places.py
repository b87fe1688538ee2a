"""Memory of a rank's GPU into which other ranks copy, and theirs that it copies to.

Each rank has four places, for the tensors of a block, and in each a part for every rank. Who sends
copies to its part and then sets a flag, for which the stream of the other one waits and which that
takes back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from ....protocol.regions.cuda_driver import CudaDriver, CudaError
from .lanes import Lanes

PLACES = 4
MOST_WAYS = 32  # ranks; flags of as many lie before the places
CLEAR = bytes(4)  # a flag
SET = (1).to_bytes(4, sys.byteorder)
_FLAGS_BYTES = PLACES * MOST_WAYS * len(CLEAR)
_GRANULE = 2 << 20  # bytes; the driver packs smaller allocations together


class SharedPlaces:
    """A rank's flags and places, and where it sees those of the others.

    Every method may raise CudaError.
    """

    def __init__(
        self,
        driver: CudaDriver,
        ordinal: int,
        device: torch.device,
        lanes: Lanes,
        rank: int,
        ways: int,
        capacity: int,
    ) -> None:
        """Allocated on a GPU, ``ordinal`` to the driver and ``device`` to torch.

        ``rank`` of ``ways`` ranks; ``capacity``: bytes of a place.
        """
        self.capacity = capacity
        self._driver = driver
        self._ordinal = ordinal
        self._device = device
        self._lanes = lanes
        self._rank = rank
        self._ways = ways
        self.nbytes = -(-(_FLAGS_BYTES + PLACES * capacity) // _GRANULE) * _GRANULE
        with driver.context(ordinal):
            self._addresses = {rank: driver.mem_alloc(self.nbytes)}

    def export(self) -> bytes:
        """Clear the flags, and give the handle by which others open it."""
        own = self._addresses[self._rank]
        with self._driver.context(self._ordinal):
            self._driver.memset_async(own, 0, _FLAGS_BYTES)
            self._driver.synchronize()
            return self._driver.ipc_get_handle(own)

    def open(self, rank: int, handle: bytes) -> None:
        """Open another rank's."""
        with self._driver.context(self._ordinal):
            self._addresses[rank] = self._driver.ipc_open_handle(handle)

    def send(self, number: int, packed: Tensor) -> Tensor:
        """Copy each rank's part of (P, …) to its place. Returns the own place, of the same shape.

        It is complete after :meth:`receive`; ``packed`` is read until then. Raises RuntimeError if
        it does not fit.
        """
        if packed.nbytes > self.capacity:
            raise RuntimeError(f"{packed.nbytes} bytes do not fit a place of {self.capacity}")
        part = packed.nbytes // self._ways
        with self._driver.context(self._ordinal):
            for step in range(1, self._ways + 1):
                peer = (self._rank + step) % self._ways  # nobody is everybody's first
                stream = self._lanes.fork(peer)
                target = self._place(peer, number) + self._rank * part
                source = packed.data_ptr() + peer * part
                self._driver.copy_on_device_async(target, source, part, stream)
                if peer != self._rank:
                    self._driver.write_value(self._flag(peer, number, self._rank), 1, stream)
        start = self._offset(number)
        place = self._own[start : start + packed.nbytes]
        return place.view(packed.dtype).view(packed.shape)

    def receive(self, numbers: Sequence[int]) -> None:
        """Have what is computed next wait for all copies, and what others sent to these places."""
        with self._driver.context(self._ordinal):
            self._lanes.join()
            flags = [
                self._flag(self._rank, number, sender)
                for number in numbers
                for sender in range(self._ways)
                if sender != self._rank
            ]
            if flags:
                self._driver.take_values(flags, 1, self._lanes.main)

    def look(self, number: int, sender: int) -> bytes:
        """The flag of what ``sender`` sends to a place, by the host."""
        with self._driver.context(self._ordinal):
            return self._driver.copy_from_device(self._flag(self._rank, number, sender), len(CLEAR))

    def close_others(self) -> None:
        """Close what is open of other ranks, once all copies are done."""
        with self._driver.context(self._ordinal):
            self._driver.synchronize()
            for rank, address in self._addresses.items():
                if rank != self._rank:
                    with suppress(CudaError):  # of a context that is broken anyway
                        self._driver.ipc_close_handle(address)

    def free(self) -> None:
        """Give the memory back; nobody may have it open any more."""
        with self._driver.context(self._ordinal):
            self._driver.mem_free(self._addresses[self._rank])

    def _place(self, rank: int, number: int) -> int:
        return self._addresses[rank] + self._offset(number)

    def _offset(self, number: int) -> int:
        return _FLAGS_BYTES + number * self.capacity

    def _flag(self, rank: int, number: int, sender: int) -> int:
        return self._addresses[rank] + (number * MOST_WAYS + sender) * len(CLEAR)

    @cached_property
    def _own(self) -> Tensor:
        """(bytes,) uint8, not a copy; made once, not for each tensor that is sent."""
        address = self._addresses[self._rank]
        if self._device.type == "cpu":  # of a driver whose devices are the host's memory
            return torch.frombuffer(self._driver.view_host(address, self.nbytes), dtype=torch.uint8)
        return torch.as_tensor(_DeviceBytes(address, self.nbytes), device=self._device)


class _DeviceBytes:
    """Memory of a GPU, for torch."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
