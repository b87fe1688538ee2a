"""What ranks do in tests of exchanges by copy engines, on the fake driver's devices."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from called_again import CalledAgain
from rank_tasks import CPU, Place
from tiny_flux import make_inputs, make_model
from xdit_sidecar.daemon.ranks.components import OpenComponents
from xdit_sidecar.daemon.ranks.denoiser import Denoiser
from xdit_sidecar.daemon.ranks.flux import recordings as recordings_module
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledShares
from xdit_sidecar.daemon.ranks.flux.recordings import Recordings
from xdit_sidecar.daemon.ranks.parallel import process_group
from xdit_sidecar.daemon.ranks.parallel.attention import LocalExchange
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.contexts import ParallelContext
from xdit_sidecar.daemon.ranks.parallel.copied_heads import CopiedHeads
from xdit_sidecar.daemon.ranks.parallel.peer_copies import PeerCopies
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.reservation import Reservation
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver


class HostLanes:
    """`Lanes` of a driver whose devices are the host: what is computed is done at once."""

    def __init__(self, driver: CudaDriver, ordinal: int) -> None:
        self._driver = driver
        self._forked = False
        with driver.context(ordinal):
            self._stream = driver.stream_create()

    @property
    def main(self) -> int:
        assert not self._forked, "what is computed next waits for no copy"
        return self._stream

    def fork(self, peer: int) -> int:
        self._forked = True
        return self._stream

    def join(self) -> None:
        self._forked = False
        self._driver.stream_synchronize(self._stream)


class Scene:
    """A model and two contexts of the same ranks, of which one exchanges by copies."""

    def __init__(self, place: Place, degrees: dict[str, int], patience: float = 10.0) -> None:
        self.group = place.join()
        self.ordinal = place.rank
        self.patience = patience
        self.driver = CudaDriver.load()
        self.made: list[PeerCopies] = []
        config = ParallelConfig(**degrees)
        self.plain = ParallelContext.build(config, self.group)
        self.copying = ParallelContext.build(config, self.group, self.make)
        self.flux = ParallelFlux(make_model(torch.float32))

    def make(self, group: Any) -> PeerCopies:
        lanes = HostLanes(self.driver, self.ordinal)
        copies = PeerCopies(self.driver, self.ordinal, CPU, lanes, group, self.patience)
        self.made.append(copies)
        return self.made[0]

    def same(self, lengths: list[int], rows: int, seed: int) -> bool:
        """Whether both contexts give the same bits."""
        inputs = FluxInputs(**make_inputs(seed, *lengths, rows, torch.float32))
        outputs = [self.flux.forward(each, inputs) for each in (self.plain, self.copying)]
        return torch.equal(*outputs)

    def free(self) -> int:
        return self.driver.memory_info(self.ordinal)[0]


def count_copies() -> list[int]:
    """Packed tensors that are sent by copies from now on, by rows of their batch."""
    sent: list[int] = []
    original = CopiedHeads._send

    def send(self: CopiedHeads, packed: torch.Tensor) -> torch.Tensor:
        sent.append(packed.shape[1])
        return original(self, packed)

    CopiedHeads._send = send  # type: ignore[method-assign]
    return sent


def slow_down(seconds: float) -> None:
    """This rank is late with its output from now on: the others are ahead of it."""
    original = LocalExchange.attend

    def attend(self: LocalExchange, *tensors: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return original(self, *tensors)

    LocalExchange.attend = attend  # type: ignore[method-assign]


@contextmanager
def broken(place: Place, name: str, after: int, otherwise: int | None) -> Iterator[None]:
    """A method of rank 1's driver does nothing from its n-th call on, or writes another value."""
    original = getattr(CudaDriver, name)
    calls = itertools.count()

    def call(self: CudaDriver, *arguments: int) -> None:
        if next(calls) < after:
            original(self, *arguments)
        elif otherwise is not None:
            original(self, arguments[0], otherwise, arguments[2])

    if place.rank == 1:
        setattr(CudaDriver, name, call)
    yield
    setattr(CudaDriver, name, original)


def copy_heads(
    place: Place, *, degrees: dict[str, int], runs: list[tuple[list[int], int]], skew: float
) -> dict[str, Any]:
    """Forwards by copies and by the group, with ``runs`` of lengths and rows, and memory."""
    scene = Scene(place, degrees)
    sent = count_copies()
    before = scene.free()
    if place.rank == 0:
        slow_down(skew)
    same, copied, held = [], [], []
    for seed, (lengths, rows) in enumerate(runs):
        count = len(sent)
        same.append(scene.same(lengths, rows, seed))
        copied.append(len(sent) - count)
        held.append(scene.made[0].nbytes)
    scene.copying.give_up()
    freed = scene.free() == before
    again = scene.same(*runs[0], 99)
    process_group.leave()
    return {
        "same": same,
        "copied": copied,
        "held": held,
        "freed": freed,
        "again": again,
        "refusal": scene.copying.no_copies,
    }


def fail_to_copy(place: Place, *, call: str) -> dict[str, Any]:
    """One rank's driver refuses ``call`` for a while, when there is a smaller buffer already."""
    scene = Scene(place, {"ulysses": place.world_size})
    sent = count_copies()
    same = [scene.same([64, 16], 1, 0)]
    before, copied = scene.free(), len(sent)
    if place.rank == 1:
        os.environ["FAKE_CUDA_FAIL"] = f"{call}=2"
    same += [scene.same([512, 64], 4, seed) for seed in range(2)]
    larger = len(sent) - copied
    freed = scene.free() == before
    same.append(scene.same([64, 16], 1, 1))
    smaller = len(sent) - copied - larger
    refusal = scene.copying.no_copies
    os.environ.pop("FAKE_CUDA_FAIL", None)
    scene.copying.give_up()
    copied = len(sent)
    same.append(scene.same([512, 64], 4, 3))
    later = len(sent) - copied
    scene.copying.give_up()
    process_group.leave()
    return {
        "same": same,
        "larger": larger,
        "smaller": smaller,
        "later": later,
        "freed": freed,
        "refusal": refusal,
    }


def lose_copies(
    place: Place, *, name: str, after: int, otherwise: int | None, patience: float
) -> dict[str, Any]:
    """A board on which what rank 1 sends does not come, or comes as something else."""
    scene = Scene(place, {"ulysses": place.world_size}, patience)
    sent = count_copies()
    before = scene.free()
    with broken(place, name, after, otherwise):
        same = [scene.same([64, 16], 1, seed) for seed in range(2)]
    freed = scene.free() == before
    scene.copying.give_up()
    same.append(scene.same([64, 16], 1, 3))  # a board stays as it is
    process_group.leave()
    refusal = scene.copying.no_copies
    return {"same": same, "copied": len(sent), "freed": freed, "refusal": refusal}


def give_up_in_the_middle(place: Place, *, after: int) -> dict[str, Any]:
    """All ranks fail after so many sent tensors of a forward; what is said of the next."""
    scene = Scene(place, {"ulysses": place.world_size})
    scene.same([64, 16], 1, 0)
    original = CopiedHeads._send
    calls = itertools.count()

    def send(self: CopiedHeads, packed: torch.Tensor) -> torch.Tensor:
        if next(calls) == after:
            raise ValueError("in the middle")
        return original(self, packed)

    CopiedHeads._send = send  # type: ignore[method-assign]
    inputs = FluxInputs(**make_inputs(1, 64, 16, 1, torch.float32))
    with suppress(ValueError):
        scene.flux.forward(scene.copying, inputs)
    CopiedHeads._send = original  # type: ignore[method-assign]
    try:
        same = scene.same([64, 16], 1, 1)
    except RuntimeError as error:
        return {"refused": str(error), "same": None}
    return {"refused": None, "same": same}


def look_for_copies(place: Place) -> dict[str, Any]:
    """What a rank on a GPU of its own finds by the driver that is here, and tells."""
    group = place.join()
    context = ParallelContext.build(ParallelConfig(ulysses=2), group)
    on_gpu = replace(group, backend="nccl", device=torch.device("cuda", 0))
    reservation = Reservation(group, reserve=0, neighbours=1)
    components = OpenComponents(CPU, reservation)
    denoiser = Denoiser(on_gpu, components, reservation, compiles=False)
    before = denoiser.by_nccl
    found = denoiser._make_copies(context._sequence_groups[0])
    process_group.leave()
    return {"before": before, "found": found is not None, "told": denoiser.by_nccl}


def record_copies(place: Place, *, lengths: list[list[int]], count: int) -> dict[str, Any]:
    """Compiled forwards by copies, recorded and replayed, against eager ones by the group."""
    scene = Scene(place, {"ulysses": place.world_size})
    reservation = Reservation(scene.group, reserve=0, neighbours=1)
    recordings = Recordings(scene.group, reservation, CalledAgain)
    ways = place.world_size
    shares = CompiledShares(scene.flux, ways=ways, backend="eager", recordings=recordings)
    recordings_module._FIRST = 2
    same = []
    for number in range(count):
        inputs = FluxInputs(
            **make_inputs(number, *lengths[number % len(lengths)], 1, torch.float32)
        )
        given = shares.forward(scene.copying, inputs)
        same.append(torch.equal(given, scene.flux.forward(scene.plain, inputs)))
        while shares.compilation.next_piece is not None:
            shares.compile_piece()
    recorded = shares.recorded
    recordings.forget()
    scene.copying.give_up()
    process_group.leave()
    return {"same": same, "recorded": recorded, "refusal": recordings.refusal}


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        copy_heads,
        fail_to_copy,
        lose_copies,
        give_up_in_the_middle,
        look_for_copies,
        record_copies,
    )
}
