"""What ranks do in tests of exchanges by copy engines, on the fake driver's devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from called_again import CalledAgain
from rank_tasks import CPU, Place
from tiny_flux import make_inputs, make_model
from xdit_sidecar.daemon.ranks.flux import recordings as recordings_module
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledShares
from xdit_sidecar.daemon.ranks.flux.recordings import Recordings
from xdit_sidecar.daemon.ranks.parallel import peer_copies, process_group
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.contexts import ParallelContext
from xdit_sidecar.daemon.ranks.parallel.peer_copies import CopiedHeads, PeerCopies
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.reservation import Reservation
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver


class HostLanes:
    """`Lanes` of a driver whose devices are the host: what is computed is done at once."""

    def __init__(self, driver: CudaDriver, ordinal: int) -> None:
        self._driver = driver
        with driver.context(ordinal):
            self.main = driver.stream_create()

    def fork(self, peer: int) -> int:
        return self.main

    def join(self) -> None:
        self._driver.stream_synchronize(self.main)


class Scene:
    """A model and two contexts of the same ranks, of which one exchanges by copies."""

    def __init__(self, place: Place, degrees: dict[str, int]) -> None:
        self.group = place.join()
        self.ordinal = place.rank
        self.driver = CudaDriver.load()
        self.made: list[PeerCopies] = []
        config = ParallelConfig(**degrees)
        self.plain = ParallelContext.build(config, self.group)
        self.copying = ParallelContext.build(config, self.group, self.make)
        self.flux = ParallelFlux(make_model(torch.float32))

    def make(self, group: Any) -> PeerCopies:
        lanes = HostLanes(self.driver, self.ordinal)
        self.made.append(PeerCopies(self.driver, self.ordinal, CPU, lanes, group))
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


def copy_heads(
    place: Place, *, degrees: dict[str, int], runs: list[tuple[list[int], int]]
) -> dict[str, Any]:
    """Forwards by copies and by the group, with ``runs`` of lengths and rows, and memory."""
    scene = Scene(place, degrees)
    sent = count_copies()
    before = scene.free()
    same, copied, held = [], [], []
    for seed, (lengths, rows) in enumerate(runs):
        count = len(sent)
        same.append(scene.same(lengths, rows, seed))
        copied.append(len(sent) - count)
        held.append(scene.made[0].nbytes)
    scene.copying.give_up()
    freed = scene.free() == before
    again = scene.same(*runs[0], 99)
    taken = before - scene.free()
    process_group.leave()
    return {
        "same": same,
        "copied": copied,
        "held": held,
        "freed": freed,
        "again": again,
        "taken": taken,
        "refusal": scene.made[0].refusal,
    }


def fail_to_copy(place: Place, *, call: str) -> dict[str, Any]:
    """One rank's driver refuses ``call``."""
    scene = Scene(place, {"ulysses": place.world_size})
    sent = count_copies()
    before = scene.free()
    if place.rank == 1:
        os.environ["FAKE_CUDA_FAIL"] = f"{call}=2"
    same = [scene.same([64, 16], 1, seed) for seed in range(2)]
    os.environ.pop("FAKE_CUDA_FAIL", None)
    found = {
        "same": same,
        "copied": len(sent),
        "freed": scene.free() == before,
        "refusal": scene.made[0].refusal,
    }
    scene.copying.give_up()
    process_group.leave()
    return found


def lose_copies(place: Place, *, fault: str) -> dict[str, Any]:
    """A board on which what rank 1 sends does not come, or comes as something else; for a while."""
    scene = Scene(place, {"ulysses": place.world_size})
    sent = count_copies()
    peer_copies._PROOF_SECONDS = 0.5
    if place.rank == 1:
        original = {"copy_on_device_async": CudaDriver.copy_on_device_async}
        original["write_value"] = CudaDriver.write_value
        setattr(CudaDriver, fault, lambda *_: None)
    same = [scene.same([64, 16], 1, seed) for seed in range(2)]
    refusal, copied = scene.made[0].refusal, len(sent)
    if place.rank == 1:
        setattr(CudaDriver, fault, original[fault])
    scene.copying.give_up()
    same.append(scene.same([64, 16], 1, 3))
    scene.copying.give_up()
    process_group.leave()
    return {"same": same, "copied": copied, "refusal": refusal, "later": len(sent)}


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
    task.__name__: task for task in (copy_heads, fail_to_copy, lose_copies, record_copies)
}
