"""What ranks do in tests of forwards, contexts, deadlines and PipeFusion."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from called_again import CalledAgain
from tiny_flux import (
    digest,
    make_inputs,
    make_model,
    make_reference,
    root_mean_square,
    run_plain,
)
from torch import Tensor
from xdit_sidecar.daemon.ranks.flux import recordings as recordings_module
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledShares
from xdit_sidecar.daemon.ranks.flux.recordings import Recordings
from xdit_sidecar.daemon.ranks.parallel import attention, contexts, process_group
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.contexts import ParallelContext
from xdit_sidecar.daemon.ranks.parallel.kv_store import KvStore
from xdit_sidecar.daemon.ranks.parallel.pipefusion import PipeFusion
from xdit_sidecar.daemon.ranks.parallel.process_group import RankGroup
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.reservation import Reservation

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Which rank this is and where the ranks meet."""

    rank: int
    world_size: int
    directory: Path

    def join(self, deadline: float = 20.0) -> RankGroup:
        return process_group.join(
            rank=self.rank,
            world_size=self.world_size,
            device=CPU,
            backend="gloo",
            meeting_file=self.directory / "meeting",
            deadline=deadline,
        )

    def signal(self, word: str) -> None:
        (self.directory / word).touch()

    def wait_for(self, word: str) -> None:
        while not (self.directory / word).exists():
            time.sleep(0.01)


def measure_errors(
    place: Place,
    *,
    configs: list[dict[str, int]],
    lengths: list[list[int]],
    batches: list[int],
    seeds: list[int],
    exchange: bool = True,
) -> dict[str, Any]:
    """RMS errors against fp64, of the ranks and of one process, per case; digests of outputs."""
    if not exchange:
        local = attention.LocalExchange()
        attention.SequenceExchange.begin = lambda self, *make: local.begin(*make)
        attention.SequenceExchange.finish = lambda self, begun, **more: local.finish(begun, **more)
    group = place.join()
    reference = make_reference()
    plain = {name: make_model(dtype) for name, dtype in DTYPES.items()}
    flux = {name: ParallelFlux(make_model(dtype)) for name, dtype in DTYPES.items()}
    cases: list[dict[str, Any]] = []
    outputs: list[str] = []
    for degrees in configs:
        context = ParallelContext.build(ParallelConfig(**degrees), group)
        every = itertools.product(lengths, batches, DTYPES, seeds)
        for number, ((image, text), rows, dtype, seed) in enumerate(every):
            inputs = make_inputs(seed, image, text, rows, DTYPES[dtype])
            output = flux[dtype].forward(context, FluxInputs(**inputs))
            outputs.append(digest(output))
            if number % place.world_size != place.rank:
                continue  # the reference of this case is another rank's work
            exact = run_plain(reference, {k: v.double() for k, v in inputs.items()})
            alone = run_plain(plain[dtype], inputs)
            assert output.shape == alone.shape
            assert output.dtype == alone.dtype
            cases.append(
                {
                    "config": str(context.config),
                    "lengths": f"{image}/{text}",
                    "rows": rows,
                    "dtype": dtype,
                    "seed": seed,
                    "nan": bool(output.isnan().any()),
                    "error": root_mean_square(output.double() - exact),
                    "alone": root_mean_square(alone.double() - exact),
                    "size": root_mean_square(exact),
                }
            )
    process_group.leave()
    return {"cases": cases, "outputs": outputs}


def switch_contexts(place: Place, *, configs: list[dict[str, int]]) -> dict[str, Any]:
    """Times of switches, digests of outputs before and after, and of the weights."""
    group = place.join()
    model = make_model(torch.float32)
    weights = list(model.parameters())
    before = digest(*weights)
    pointers = [weight.data_ptr() for weight in weights]
    flux = ParallelFlux(model)
    inputs = FluxInputs(**make_inputs(5, 63, 13, 2, torch.float32))
    kept = [ParallelContext.build(ParallelConfig(**degrees), group) for degrees in configs]
    groups = contexts.process_groups()
    first = [digest(flux.forward(context, inputs)) for context in kept]
    times, later = [], []
    for _ in range(3):
        for context in kept:
            start = time.perf_counter()
            context.activate()
            times.append(time.perf_counter() - start)
            later.append(digest(flux.forward(context, inputs)))
    found = {
        "median_switch": statistics.median(times),
        "first": first,
        "later": later,
        "more_groups": len(contexts.process_groups()) - len(groups),
        "groups_alone": groups.count([group.rank]),
        "weights_unchanged": digest(*model.parameters()) == before,
        "weights_in_place": [w.data_ptr() for w in model.parameters()] == pointers,
    }
    process_group.leave()
    return found


def meet_silence(
    place: Place,
    *,
    configs: list[dict[str, int]],
    deadline: float,
    later_deadline: float = 0,
    die: bool = False,
) -> list[float]:
    """Seconds until each config's forward raises while the last rank stays away; its own: []."""
    group = place.join(deadline)
    kept = [ParallelContext.build(ParallelConfig(**degrees), group) for degrees in configs]
    flux = ParallelFlux(make_model(torch.float32))
    inputs = FluxInputs(**make_inputs(5, 16, 8, 2, torch.float32))
    if later_deadline:
        process_group.set_deadline(later_deadline)
    waits = []
    for number, context in enumerate(kept):
        if place.rank == place.world_size - 1:
            if die:
                time.sleep(0.2)
                os._exit(1)
            place.wait_for(f"raised{number}")
            continue
        start = time.monotonic()
        with suppress(RuntimeError):
            _forward(flux, context, inputs)
            raise AssertionError(f"{context.config}: no error")
        waits.append(time.monotonic() - start)
        place.signal(f"raised{number}")
    os._exit(_write_and_end(place, waits))


def _write_and_end(place: Place, value: object) -> int:
    # Groups that failed are not destroyed in an orderly way: a rank ends as one does in earnest.
    import json

    (place.directory / f"rank{place.rank}.json").write_text(json.dumps({"value": value}))
    return 0


def _forward(flux: ParallelFlux, context: ParallelContext, inputs: FluxInputs) -> Tensor:
    if context.config.pipefusion == 1:
        return flux.forward(context, inputs)
    driver = PipeFusion(flux, KvStore(max_entries=4, max_bytes=1 << 30))
    return driver.step(context, inputs, session="s", slot="cond", condition="c").output


def meet_alone(place: Place, *, deadline: float) -> float:
    """Seconds until the meeting is given up, because nobody else comes."""
    start = time.monotonic()
    try:
        process_group.join(
            rank=0,
            world_size=2,
            device=CPU,
            backend="gloo",
            meeting_file=place.directory / "lonely",
            deadline=deadline,
        )
    except process_group.RendezvousError:
        return time.monotonic() - start
    raise AssertionError("the meeting took place")


def list_open_ports(place: Place) -> list[str]:
    """Addresses that this rank listens on, as in /proc/net/tcp (hexadecimal)."""
    group = place.join()
    ParallelContext.build(ParallelConfig(ulysses=place.world_size), group)
    own = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].split(":")[0])
    process_group.leave()
    return found


def run_pipefusion(
    place: Place,
    *,
    degrees: dict[str, int],
    image: int,
    text: int,
    rows: int,
    patches: int,
) -> dict[str, Any]:
    """A run of steps towards sigma 0, two interleaved ones, and what makes a step warm."""
    group = place.join()
    context = ParallelContext.build(ParallelConfig(**degrees), group)
    model = make_model(torch.float32, num_layers=3, num_single_layers=3)
    plain = make_model(torch.float32, num_layers=3, num_single_layers=3)
    before = digest(*model.parameters())
    flux = ParallelFlux(model)

    def steps(seed: int, pace: float = 0.04) -> list[dict[str, Tensor]]:
        given = make_inputs(seed, image, text, rows, torch.float32)
        noise, made = given["hidden_states"], []
        for number in range(4):
            sigma = 1.0 - number * pace
            sigmas = torch.full((rows,), sigma)
            made.append({**given, "hidden_states": noise * sigma, "timestep": sigmas})
        return made

    def run(driver: PipeFusion, given: dict[str, Tensor], slot: str, **more: Any) -> Any:
        options = {"session": "s", "condition": slot, **more}
        return driver.step(context, FluxInputs(**given), slot=slot, **options)

    def driver(entries: int = 8) -> PipeFusion:
        return PipeFusion(flux, KvStore(max_entries=entries, max_bytes=1 << 30), patches=patches)

    def error(output: Tensor, given: dict[str, Tensor]) -> float:
        alone = run_plain(plain, given).double()
        return root_mean_square(output.double() - alone) / root_mean_square(alone)

    one, two, slow = steps(1), steps(2), steps(1, 0.000004)
    solo = driver()
    results = [run(solo, given, "a") for given in one]
    warm = [run(driver(), given, "a") for given in one]
    slowly = driver()
    slow_results = [run(slowly, given, "a") for given in slow]
    mixed, solo_two = driver(), driver()
    interleaved = [
        [digest(run(mixed, a, "a").output), digest(run(mixed, b, "b").output)]
        for a, b in zip(one, two, strict=True)
    ]
    alone_two = [digest(run(solo_two, given, "b").output) for given in two]
    start, next_step = one[:2]
    other = make_inputs(3, image + 1, text, rows, torch.float32)
    small = {"timestep": next_step["timestep"]}

    def warm_after(given: dict[str, Tensor], entries: int = 8, **more: Any) -> bool:
        fresh = driver(entries)
        run(fresh, start, "a")
        assert not run(fresh, next_step, "a").warm
        if entries == 1:
            run(fresh, start, "b")
        return bool(run(fresh, given, "a", **more).warm)

    later = one[2]
    cramped = PipeFusion(flux, KvStore(max_entries=8, max_bytes=1), patches=patches)
    no_number = torch.full((rows,), math.nan)
    poisoned = driver()
    run(poisoned, start, "a")
    run(poisoned, {**next_step, "timestep": no_number}, "a")
    after_no_number = bool(run(poisoned, later, "a").warm)
    forgotten = driver()
    run(forgotten, start, "a")
    forgotten.forget("s")
    found = {
        "warm": [result.warm for result in results],
        "errors": [error(r.output, given) for r, given in zip(results, one, strict=True)],
        "warm_errors": [error(r.output, given) for r, given in zip(warm, one, strict=True)],
        "slow_errors": [
            error(result.output, given) for result, given in zip(slow_results, slow, strict=True)
        ],
        # As if the whole output were that of the step before.
        "no_update": error(run_plain(plain, one[0]), one[1]),
        "outputs": [digest(result.output) for result in results],
        "interleaved": [pair[0] for pair in interleaved],
        "interleaved_two": [pair[1] for pair in interleaved],
        "alone_two": alone_two,
        "nan": any(bool(result.output.isnan().any()) for result in results),
        "warm_when": {
            "sigma falls": warm_after(later),
            "sigma repeats": warm_after(next_step),
            "sigma rises": warm_after(start),
            "sigma is no number": warm_after({**later, "timestep": no_number}),
            "sigma was no number": after_no_number,
            "image grows": warm_after({**other, **small}),
            "condition changes": warm_after(later, condition="other"),
            "adapters change": warm_after(later, adapters="lora"),
            "another session": warm_after(later, session="t"),
            "asked for": warm_after(later, warm=True),
            "pushed out": warm_after(later, entries=1),
            "store too small": all(run(cramped, given, "a").warm for given in one),
            "session forgotten": bool(run(forgotten, next_step, "a").warm),
        },
        "weights_unchanged": digest(*model.parameters()) == before,
        "blocks_in_place": len(model.transformer_blocks) == len(model.single_transformer_blocks),
    }
    process_group.leave()
    return found


def keep_deadline(place: Place, *, deadline: float) -> list[float]:
    """Timeouts (seconds) of all process groups of a rank with several contexts."""
    group = place.join(deadline)
    for degrees in ({"ulysses": 2}, {"ring": 2}, {"pipefusion": 2}):
        ParallelContext.build(ParallelConfig(**degrees), group)
    alive = list(torch.distributed.distributed_c10d._world.pg_map)
    found = [g._get_backend(CPU).options._timeout.total_seconds() for g in alive]
    torch.distributed.barrier()  # the other may still be connecting
    process_group.leave()
    return [seconds for seconds in found if not math.isclose(seconds, deadline)] + [len(found)]


def record_shares(place: Place, *, runs: list[tuple[list[int], int]], later: int) -> dict[str, Any]:
    """Compiled forwards of a share of the tokens, recorded; the last rank compiles ``later``.

    ``runs``: the lengths of image and text, and how many forwards.
    """
    group = place.join()
    context = ParallelContext.build(ParallelConfig(ulysses=place.world_size), group)
    flux = ParallelFlux(make_model(torch.float32))
    reservation = Reservation(group, reserve=0, neighbours=1)
    recordings = Recordings(group, reservation, CalledAgain)
    shares = CompiledShares(flux, ways=place.world_size, backend="eager", recordings=recordings)
    recordings_module._FIRST = 2
    patience = later if place.rank == place.world_size - 1 else 0
    same, recorded = [], []
    for number, lengths in enumerate(lengths for lengths, count in runs for _ in range(count)):
        inputs = FluxInputs(**make_inputs(number, *lengths, 1, torch.float32))
        given = shares.forward(context, inputs)
        same.append(torch.equal(given, flux.forward(context, inputs)))
        recorded.append(shares.recorded)
        while number >= patience and shares.compilation.next_piece is not None:
            shares.compile_piece()
    found = {"same": same, "recorded": recorded, "refusal": recordings.refusal}
    process_group.leave()
    return found


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        *(measure_errors, switch_contexts, meet_silence, meet_alone, list_open_ports),
        *(run_pipefusion, keep_deadline, record_shares),
    )
}
