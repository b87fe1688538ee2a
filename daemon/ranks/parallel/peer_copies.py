"""Heads exchanged by the copy engines of GPUs, through memory that ranks share by CUDA IPC.

NCCL exchanges by kernels, which take processors from what is computed meanwhile; copy engines take
none. Each rank has a place for what each other one sends it. Who sends copies to there, and then
sets a flag, for which the stream of the other one waits and which that takes back.

One place for each of the four tensors of a block is enough, and nobody has to be told that it is
free: a rank sends a block's query, key or value only after it has, of everybody, the output of the
block before, which they sent when they had attended; and an output only after it has the query, key
and value of everybody, which are computed from what was received of the output before.

A stream waits for a flag without a deadline. A collective that has one must follow before a rank
waits for what is computed: at the end of each forward its tokens are gathered.
"""

from __future__ import annotations

import enum
import sys
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

_PLACES = 4  # of a block: value, key and query, then the output
_GRANULE = 2 << 20  # bytes; the driver packs smaller allocations together
_FLAG_BYTES = 4
_MOST_WAYS = 32  # flags of as many ranks lie before the places
_PROOF_BYTES = 1 << 20
_SMALLEST = 64 << 10  # bytes of a place
_SET = (1).to_bytes(_FLAG_BYTES, sys.byteorder)
_FLAGS_BYTES = _PLACES * _MOST_WAYS * _FLAG_BYTES
_LONGEST_REASON = 200


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


class _Verdict(enum.IntEnum):
    """On a new buffer; that of a group is its worst."""

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
        self._driver = driver
        self._ordinal = ordinal
        self._device = device
        self._lanes = lanes
        self._group = group
        self._patience = patience
        self._rank = dist.get_rank(group)
        self._ways = dist.get_world_size(group)
        self._buffers: list[_Buffer] = []  # each larger than the one before
        self._proven = False
        self._verdict = _Verdict.FIT
        self._reason = ""  # this rank's own, for another verdict
        self._last: CopiedHeads | None = None

    @classmethod
    def on_gpu(cls, device: torch.device, patience: float, group: Any) -> PeerCopies:
        """Those of a rank on that GPU. Raises CudaUnavailable."""
        if dist.get_world_size(group) > _MOST_WAYS:
            raise CudaUnavailable(f"at most {_MOST_WAYS} ranks can share a forward by copies")
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
        fitting = [buffer for buffer in self._buffers if buffer.capacity >= nbytes]
        if not fitting and self._verdict is _Verdict.FIT and self._add_buffer(nbytes):
            fitting = self._buffers[-1:]
        self._last = CopiedHeads(self, fitting[0], attend) if fitting else None
        return self._last

    def close(self) -> None:
        """Free all memory; what there was no room for is tried again.

        No recording of an exchange may be left.
        """
        if self._verdict is _Verdict.NO_ROOM:
            self._verdict = _Verdict.FIT
        self._last = None
        buffers, self._buffers = self._buffers, []
        if buffers:
            self._release(buffers)

    @property
    def refusal(self) -> str | None:
        """Why there is no exchange for what is larger than before, or at all."""
        if self._verdict is _Verdict.FIT:
            return None
        return self._reason[:_LONGEST_REASON] or "another rank cannot, and says why"

    @property
    def nbytes(self) -> int:
        """Of device memory that is held."""
        return sum(_Buffer.size(buffer.capacity) for buffer in self._buffers)

    def send(self, buffer: _Buffer, number: int, packed: Tensor) -> Tensor:
        """Copy each rank's part of (P, …) to its place. Returns the own place, of the same shape.

        It is complete after :meth:`receive`; ``packed`` is read until then.
        """
        if packed.nbytes > buffer.capacity:
            raise RuntimeError(f"{packed.nbytes} bytes do not fit a place of {buffer.capacity}")
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
        """Have what is computed next wait for all copies, and what others sent to these places."""
        with self._driver.context(self._ordinal):
            self._lanes.join()
            flags = [
                buffer.flag(self._rank, number, sender)
                for number in numbers
                for sender in range(self._ways)
                if sender != self._rank
            ]
            if flags:
                self._driver.take_values(flags, 1, self._lanes.main)

    def _add_buffer(self, nbytes: int) -> bool:
        capacity = _round_up(nbytes)
        with self._driver.context(self._ordinal):
            buffer, handle = self._allocate(capacity)
        handles = self._gather(handle)
        mine = _Verdict.NO_ROOM
        if buffer is not None:
            mine = self._judge(self._open, buffer, handles) if any(handle) else _Verdict.UNFIT
        verdict = self._worst(mine)
        if verdict is _Verdict.FIT and buffer is not None and not self._proven:
            verdict = self._worst(self._judge(self._prove, buffer))
        if verdict is _Verdict.FIT and buffer is not None:
            self._proven = True
            self._buffers.append(buffer)
            return True
        self._release([] if buffer is None else [buffer])
        self._verdict = verdict
        return False

    def _allocate(self, capacity: int) -> tuple[_Buffer | None, bytes]:
        """With a handle of zeros where there is none."""
        no_handle = bytes(IPC_HANDLE_BYTES)
        try:
            address = self._allocate_bytes(_Buffer.size(capacity))
        except CudaError as error:
            self._reason = str(error)
            return None, no_handle
        buffer = _Buffer(address, capacity, self._rank)
        try:
            self._driver.memset_async(address, 0, _FLAGS_BYTES)
            self._driver.synchronize()
            return buffer, self._driver.ipc_get_handle(address)
        except CudaError as error:
            self._reason = str(error)
            return buffer, no_handle

    def _allocate_bytes(self, nbytes: int) -> int:
        try:
            return self._driver.mem_alloc(nbytes)
        except CudaError:
            if self._device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # torch may keep what nobody uses
            return self._driver.mem_alloc(nbytes)

    def _judge(self, accept: Callable[..., bool], *arguments: object) -> _Verdict:
        """What a step comes to that asks nothing of other ranks; RuntimeError is torch's."""
        try:
            with self._driver.context(self._ordinal):
                return _Verdict.FIT if accept(*arguments) else _Verdict.UNFIT
        except (CudaError, RuntimeError) as error:
            self._reason = str(error)
            full = isinstance(error, torch.OutOfMemoryError)
            return _Verdict.NO_ROOM if full else _Verdict.UNFIT

    def _open(self, buffer: _Buffer, handles: Sequence[bytes]) -> bool:
        for peer, handle in enumerate(handles):
            if peer != self._rank and any(handle):
                buffer.addresses[peer] = self._driver.ipc_open_handle(handle)
        return True

    def _prove(self, buffer: _Buffer) -> bool:
        """Whether what is sent comes as it is: some boards only say that they reach each other."""
        nbytes = min(_PROOF_BYTES, buffer.capacity // self._ways)
        everybody = range(self._ways)
        end = time.monotonic() + self._patience
        for number in range(_PLACES):
            sent = [self._pattern(self._rank, peer, number, nbytes) for peer in everybody]
            packed = torch.stack(sent)
            place = self.send(buffer, number, packed)
            senders = [peer for peer in everybody if peer != self._rank]
            if not all(self._sees_flag(buffer, number, peer, end) for peer in senders):
                return False
            self.receive(buffer, [number])
            del packed  # it was read until then
            for peer in everybody:
                if not torch.equal(place[peer], self._pattern(peer, self._rank, number, nbytes)):
                    self._reason = f"what {self._name(peer)} sends comes as something else"
                    return False
        return True

    def _sees_flag(self, buffer: _Buffer, number: int, peer: int, end: float) -> bool:
        """By the host, which can give up."""
        flag, clear = buffer.flag(self._rank, number, peer), bytes(_FLAG_BYTES)
        while (found := self._driver.copy_from_device(flag, _FLAG_BYTES)) == clear:
            if time.monotonic() > end:
                self._reason = f"what {self._name(peer)} sends does not come"
                return False
            time.sleep(0.001)
        if found != _SET:
            self._reason = f"what {self._name(peer)} sends comes as something else"
        return found == _SET

    def _pattern(self, sender: int, receiver: int, number: int, nbytes: int) -> Tensor:
        """(nbytes,) uint8 that everybody knows."""
        seed = (sender * _MOST_WAYS + receiver) * _PLACES + number
        places = torch.arange(nbytes, dtype=torch.int32, device=self._device)
        return (places * 40503 + seed * 9973 >> 5 & 255).to(torch.uint8)

    def _name(self, peer: int) -> str:
        return f"rank {dist.get_global_rank(self._group, peer)}"

    def _release(self, buffers: Sequence[_Buffer]) -> None:
        """Free them, once nobody has them open; all ranks together."""
        with self._driver.context(self._ordinal):
            self._driver.synchronize()
            for buffer in buffers:
                for peer, address in buffer.addresses.items():
                    if peer != self._rank:
                        with suppress(CudaError):  # of a context that is broken anyway
                            self._driver.ipc_close_handle(address)
        self._worst(_Verdict.FIT)
        with self._driver.context(self._ordinal):
            for buffer in buffers:
                self._driver.mem_free(buffer.addresses[self._rank])

    def _worst(self, verdict: _Verdict) -> _Verdict:
        return _Verdict(max(found for (found,) in self._gather(bytes([verdict]))))

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
    """A `HeadExchange` over `PeerCopies`; all ranks' packed tensors have as many bytes.

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

    @property
    def unfinished(self) -> bool:
        """Whether something was sent that was not received."""
        return bool(self._count % _PLACES or self._sent or self._coming)

    def join(self) -> None:
        """See `HeadExchange.join`."""
        self._copies.receive(self._buffer, list(self._sent))
        self._sent.clear()

    def give_up(self) -> None:
        """See `HeadExchange.give_up`."""
        self._copies.receive(self._buffer, [])
        self._count = 0
        self._sent.clear()
        self._coming.clear()

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


def _round_up(nbytes: int) -> int:
    """By an eighth at most, so that few sizes make few buffers."""
    step = max(_SMALLEST, 1 << nbytes.bit_length() >> 4)
    return -(-nbytes // step) * step
