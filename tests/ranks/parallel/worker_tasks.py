"""What ranks do in tests of what a worker keeps from turn to turn."""

from __future__ import annotations

from typing import Any

import flux_files
import torch
from flux_files import Flux
from flux_inputs import comfy_inputs
from rank_tasks import Place
from rank_worker import RankWorker
from xdit_sidecar.daemon.ranks.denoiser import _Resident
from xdit_sidecar.daemon.ranks.parallel import process_group
from xdit_sidecar.daemon.ranks.reservation import Reservation
from xdit_sidecar.daemon.ranks.worker import Worker
from xdit_sidecar.protocol import messages as m

FLUX = Flux(heads=4, double=1, single=1)
PIPEFUSION = m.Degrees(pipefusion=2)


class Room(Reservation):
    """What was asked for; ``short`` makes the next question one of too little room."""

    short = False
    asked: list[tuple[int, int]]  # bytes, and those that stay

    def check(self, nbytes: int, what: str, *, alone: bool = False, lasting: int = 0) -> None:
        self.asked.append((nbytes, lasting))
        if self.short:
            self._fitted = 0
        super().check(nbytes, what, alone=alone, lasting=lasting)

    def _free(self) -> int:
        return 0 if self.short else 1 << 40


def keep_runs(place: Place) -> dict[str, Any]:
    """How many runs of PipeFusion are kept after which event; what was reserved for them."""
    group = place.join()
    room = Room(group, reserve=0, neighbours=2)
    room.asked = []
    rank = RankWorker(Worker(group, room, compiles=False))
    rank.open(flux_files.random_weights(FLUX), "transformer")
    inputs = comfy_inputs(FLUX, batch=1)
    text = {"context": inputs["context"], "y": inputs["y"]}
    picture = m.Generate(
        *(), components={}, tensors=[], compute="F32", degrees=PIPEFUSION, decode=False,
        width=64, height=64, steps=3,
    )  # fmt: skip
    forward = m.Forward(components={}, tensors=[], compute="F32", degrees=PIPEFUSION, run="one")

    def kept() -> int:
        (resident,) = rank.worker._components.built(_Resident)
        return len(resident.pipefusion._store)

    def forwards(session: str) -> m.Outcome:
        outcome: m.Outcome = m.Done()
        for sigma in (0.9, 0.8):
            given = {**inputs, "timestep": torch.tensor([sigma])}
            outcome = rank.begin(100, forward, given, session)
            assert isinstance(outcome, m.Output), outcome
        return outcome

    def draw(job: int, turns: int, session: str) -> None:
        outcome = rank.begin(job, picture, text, session)
        for _ in range(turns):
            assert isinstance(outcome, m.Step), outcome
            outcome = rank.go_on(job, session)
        assert not isinstance(outcome, m.Failed), outcome

    found: dict[str, Any] = {}
    forwards("a")
    found["forward"] = kept()
    found["asked"] = list(room.asked)
    rank.drop(sessions=["a"])
    found["session ended"] = kept()
    draw(1, 2, "a")
    found["picture in progress"] = kept()
    forwards("b")
    rank.trim()
    found["trimmed"] = kept()
    forwards("b")
    room.short = True
    refused = rank.begin(101, forward, inputs, "c")
    found["short"] = refused.code if isinstance(refused, m.Failed) else str(refused)
    room.short = False
    found["after shortage"] = kept()
    rank.drop(jobs=[1])
    found["picture dropped"] = kept()
    draw(2, 4, "a")
    found["picture ended"] = kept()
    draw(3, 2, "a")
    # Its prompt is lost, which ends the picture.
    rank.worker._runs[3].run._positive = None
    rank.worker._runs[3].run._tensors = {}
    failed = rank.go_on(3, "a")
    found["failed"] = failed.code if isinstance(failed, m.Failed) else str(failed)
    found["picture failed"] = kept()
    process_group.leave()
    return found


TASKS = {"keep_runs": keep_runs}
