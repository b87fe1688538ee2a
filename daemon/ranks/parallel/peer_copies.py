"""Heads exchanged by the copy engines of GPUs, through memory that ranks share by CUDA IPC.

NCCL exchanges by kernels, which take processors from what is computed meanwhile; copy engines take
none. Each rank has a place for what each other one sends it. Who sends copies to there, and then
sets a flag, for which the stream of the other one waits and which that takes back.

One place for each of the four tensors of a block is enough, and nobody has to be told that it is
free: a rank sends a block's query, key or value only after it has, of everybody, the output of the
block before, which they sent when they had attended; and an output only after it has the query, key
and value of everybody, which are computed from what was received of the output before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ....protocol.regions.cuda_driver import (
    IPC_HANDLE_BYTES,
    CudaDriver,
    CudaError,
    CudaUnavailable,
)
from .ulysses import Attend, HeadExchange

_log = logging.getLogger(__name__)
_PLACES = 4  # of a block: value, key and query, then the output
_GRANULE = 2 << 20  # bytes; the driver packs smaller allocations together
_FLAG_BYTES = 4
_MOST_WAYS = 32  # flags of as many ranks lie before the places
_PROOF_BYTES = 1 << 20
_PROOF_SECONDS = 10.0
_FLAGS_BYTES = _PLACES * _MOST_WAYS * _FLAG_BYTES


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


class _Buffer:
    """A rank's flags and places, and where it sees those of the others."""

    def __init__(self, address: int, capacity: int, rank: int) -> None:
        """``capacity``: bytes of a place."""
        self.capacity = capacity
        self.rank = rank
        self.addresses = {rank: address}  # by rank

    @staticmethod
    def size(capacity: int) -> int:
        """Bytes of one."""
        return -(-(_FLAGS_BYTES + _PLACES * capacity) // _GRANULE) * _GRANULE

    def place(self, rank: int, number: int) -> int:
        """The address of a rank's place."""
        return self.addresses[rank] + _FLAGS_BYTES + number * self.capacity

    def flag(self, rank: int, number: int, sender: int) -> int:
        """The address of what says that the part of a place has come which ``sender`` sends."""
        return self.addresses[rank] + (number * _MOST_WAYS + sender) * _FLAG_BYTES


class PeerCopies:
    """Exchanges of the ranks of ``group``, each on a GPU of its own, all of one host.

    All of them call :meth:`heads` and :meth:`close` with the same arguments, in the same order.
    """

    def __init__(
        self, driver: CudaDriver, ordinal: int, device: torch.device, lanes: Lanes, group: Any
    ) -> None:
        """``ordinal``: of the GPU; ``device``: of tensors, which ``group`` gathers too."""
        self._driver = driver
        self._ordinal = ordinal
        self._device = device
        self._lanes = lanes
        self._group = group
        self._rank = dist.get_rank(group)
        self._ways = dist.get_world_size(group)
        self._buffers: list[_Buffer] = []  # each larger than the one before
        self.refusal: str | None = None  # why there are none

    @classmethod
    def on_gpu(cls, device: torch.device, group: Any) -> PeerCopies | None:
        """Those of a rank on that GPU; None where the driver is too old for them."""
        try:
            driver = CudaDriver.load()
        except CudaUnavailable as error:
            _log.warning("ranks exchange by NCCL, not by copy engines: %s", error)
            return None
        if not driver.has_stream_values:
            _log.warning("ranks exchange by NCCL, not by copy engines: CUDA 11.7 is needed")
            return None
        return cls(driver, device.index or 0, device, CudaLanes(device), group)

    def heads(self, nbytes: int, attend: Attend) -> HeadExchange | None:
        """The exchange of one forward, whose packed tensors have as many bytes.

        None where memory cannot be shared: one rank has none, cannot open another's, or is not
        reached by it; told in the log, once until :meth:`close`. Raises RuntimeError if a rank
        stays away.
        """
        if self._ways > _MOST_WAYS or self.refusal is not None:
            return None
        fitting = [buffer for buffer in self._buffers if buffer.capacity >= nbytes]
        buffer = fitting[0] if fitting else self._add_buffer(nbytes)
        return None if buffer is None else CopiedHeads(self, buffer, attend)

    def close(self) -> None:
        """Free all memory, and try again what failed. No recording of an exchange may be left."""
        self.refusal = None
        if not self._buffers:
            return
        with self._driver.context(self._ordinal):
            self._driver.synchronize()
            self._agree(True)  # nobody copies to here any more
            for buffer in self._buffers:
                self._close_others(buffer)
            self._agree(True)
            for buffer in self._buffers:
                self._driver.mem_free(buffer.addresses[self._rank])
        self._buffers.clear()

    @property
    def nbytes(self) -> int:
        """Of device memory that is held."""
        return sum(_Buffer.size(buffer.capacity) for buffer in self._buffers)

    def send(self, buffer: _Buffer, number: int, packed: Tensor) -> Tensor:
        """Copy each rank's part of (P, …) to its place. Returns the own place, of the same shape.

        It is complete after :meth:`receive`; ``packed`` is read until then.
        """
        part = packed.nbytes // self._ways
        with self._driver.context(self._ordinal):
            for step in range(1, self._ways + 1):
                peer = (self._rank + step) % self._ways  # nobody is everybody's first
                stream = self._lanes.fork(peer)
                target = buffer.place(peer, number) + self._rank * part
                source = packed.data_ptr() + peer * part
                self._driver.copy_on_device_async(target, source, part, stream)
                if peer != self._rank:
                    flag = buffer.flag(peer, number, self._rank)
                    self._driver.write_value(flag, 1, stream)
        place = self._view(buffer.place(self._rank, number), packed.nbytes)
        return place.view(packed.dtype).view(packed.shape)

    def receive(self, buffer: _Buffer, numbers: Sequence[int]) -> None:
        """Have what is computed next wait for what others sent to these places."""
        with self._driver.context(self._ordinal):
            self._lanes.join()
            flags = [
                buffer.flag(self._rank, number, sender)
                for number in numbers
                for sender in range(self._ways)
                if sender != self._rank
            ]
            self._driver.take_values(flags, 1, self._lanes.main)

    def _add_buffer(self, nbytes: int) -> _Buffer | None:
        capacity = 1 << (nbytes - 1).bit_length()
        with self._driver.context(self._ordinal):
            buffer, handle = self._allocate(capacity)
            handles = self._gather(handle)
            opened = all(map(any, handles)) and buffer is not None and self._open(buffer, handles)
            proven = self._agree(opened) and buffer is not None and self._try(buffer)
            if self._agree(proven) and buffer is not None:
                self._buffers.append(buffer)
                return buffer
            if buffer is not None:
                self._driver.synchronize()
                self._close_others(buffer)
            self._agree(True)
            if buffer is not None:
                self._driver.mem_free(buffer.addresses[self._rank])
        self.refusal = self.refusal or "another rank cannot"
        _log.warning(
            "ranks exchange by NCCL, not by copy engines, which cannot share memory: %s",
            self.refusal,
        )
        return None

    def _allocate(self, capacity: int) -> tuple[_Buffer | None, bytes]:
        """With a handle of zeros where there is no memory."""
        size = _Buffer.size(capacity)
        try:
            address = self._driver.mem_alloc(size)
        except CudaError as error:
            self.refusal = str(error)
            return None, bytes(IPC_HANDLE_BYTES)
        buffer = _Buffer(address, capacity, self._rank)
        try:
            self._driver.memset_async(address, 0, _FLAGS_BYTES)
            self._driver.synchronize()
            return buffer, self._driver.ipc_get_handle(address)
        except CudaError as error:
            self.refusal = str(error)
            return buffer, bytes(IPC_HANDLE_BYTES)

    def _open(self, buffer: _Buffer, handles: Sequence[bytes]) -> bool:
        for peer, handle in enumerate(handles):
            if peer != self._rank:
                try:
                    buffer.addresses[peer] = self._driver.ipc_open_handle(handle)
                except CudaError as error:
                    self.refusal = str(error)
                    return False
        return True

    def _try(self, buffer: _Buffer) -> bool:
        try:
            return self._prove(buffer)
        except CudaError as error:
            self.refusal = str(error)
            return False

    def _prove(self, buffer: _Buffer) -> bool:
        """Whether what is sent comes as it is: some boards only say that they reach each other."""
        nbytes = min(_PROOF_BYTES, buffer.capacity // self._ways)
        everybody = range(self._ways)
        for number in range(_PLACES):
            sent = [self._pattern(self._rank, peer, number, nbytes) for peer in everybody]
            packed = torch.stack(sent)
            place = self.send(buffer, number, packed)
            self._lanes.join()
            if not self._wait_for_flags(buffer, number):
                return False
            self.receive(buffer, [number])
            del packed  # it was read until then
            for peer in everybody:
                if not torch.equal(place[peer], self._pattern(peer, self._rank, number, nbytes)):
                    self.refusal = f"what rank {peer} of them sends comes as something else"
                    return False
        return True

    def _wait_for_flags(self, buffer: _Buffer, number: int) -> bool:
        """By the host, which can give up."""
        for peer in range(self._ways):
            flag, end = buffer.flag(self._rank, number, peer), time.monotonic() + _PROOF_SECONDS
            while peer != self._rank and not any(self._driver.copy_from_device(flag, _FLAG_BYTES)):
                if time.monotonic() > end:
                    self.refusal = f"what rank {peer} of them sends does not come"
                    return False
                time.sleep(0.001)
        return True

    def _pattern(self, sender: int, receiver: int, number: int, nbytes: int) -> Tensor:
        """(nbytes,) uint8 that everybody knows."""
        seed = (sender * _MOST_WAYS + receiver) * _PLACES + number
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)
        return numbers.to(self._device)

    def _close_others(self, buffer: _Buffer) -> None:
        for peer, address in buffer.addresses.items():
            if peer != self._rank:
                with suppress(CudaError):  # of a context that is broken anyway
                    self._driver.ipc_close_handle(address)

    def _agree(self, whether: bool) -> bool:
        return all(map(any, self._gather(bytes([whether]))))

    def _gather(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, as many each."""
        own = torch.tensor(list(data), dtype=torch.uint8, device=self._device)
        others = [torch.empty_like(own) for _ in range(self._ways)]
        dist.all_gather(others, own, group=self._group)
        return [bytes(other.tolist()) for other in others]

    def _view(self, address: int, nbytes: int) -> Tensor:
        """(nbytes,) uint8, not a copy."""
        if self._device.type == "cpu":  # of a driver whose devices are the host's memory
            return torch.frombuffer(self._driver.view_host(address, nbytes), dtype=torch.uint8)
        return torch.as_tensor(_DeviceBytes(address, nbytes), device=self._device)


class CopiedHeads(HeadExchange):
    """A `HeadExchange` over `PeerCopies`, whose every packed tensor has as many bytes.

    What :meth:`send` and :meth:`attend` give for what is on its way only stands for it, as
    compilers may write over memory that they were given. So it costs memory that nobody touches.
    """

    def __init__(self, copies: PeerCopies, buffer: _Buffer, attend: Attend) -> None:
        super().__init__(None, attend)
        self._copies = copies
        self._buffer = buffer
        self._count = 0
        self._sent: dict[int, Tensor] = {}  # by place
        self._coming: dict[int, Tensor] = {}  # by the address of what stands for it

    def join(self) -> None:
        """See `HeadExchange.join`."""
        if self._sent:
            self._copies.receive(self._buffer, list(self._sent))
        self._sent.clear()

    def _send(self, packed: Tensor) -> Tensor:
        number = self._count % _PLACES
        self._count += 1
        standing = torch.empty_like(packed)
        self._coming[standing.data_ptr()] = self._copies.send(self._buffer, number, packed)
        self._sent[number] = packed
        return standing

    def _arrived(self, received: Tensor) -> Tensor:
        return self._coming.pop(received.data_ptr())


class _DeviceBytes:
    """Memory of a GPU, for torch."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


MakeCopies = Callable[[Any], PeerCopies | None]
