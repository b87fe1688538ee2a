"""Ranks on GPUs of their own against one rank on one GPU: FLUX.1-dev at full size.

Every way to share a forward gives what one GPU gives, at odd sizes too; components reach the other
GPUs from the first; 28 steps at 1024² and 2048², eager and compiled; decoding of large pictures; a
rank that dies in the middle of one. With 1, 2, 4 and 8 GPUs, as many as there are.

Usage: ``python benchmarks/gpu/several_gpus.py OUTPUT``. ``$XDIT_GPUS`` names the numbers that are
wanted ("1,2"), 1 always among them; ``$XDIT_COMPILE`` the modes ("off", "auto").
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import targets  # noqa: E402
import torch  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from device_memory import read_memory  # noqa: E402
from flux_forward import difference  # noqa: E402
from full_size import (  # noqa: E402
    FINGERPRINTS,
    SAME,
    Bench,
    forward_job,
    make_call,
    make_tokens,
    note_time,
    picture_job,
    run_daemon,
)
from report.speeds import read_speeds  # noqa: E402
from xdit_sidecar.daemon.commands.status import describe_transformer  # noqa: E402
from xdit_sidecar.protocol import messages as m  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402
from xdit_sidecar.protocol.errors import RankLost  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402

WORLDS = (1, 2, 4, 8)
MODES: tuple[m.Compile, ...] = ("off", "auto")
# Latent rows and columns, text tokens; the second divides by nothing.
FORWARDS = [(128, 128, 512), (125, 121, 509)]
REPEATED = 8  # forwards; a recording is made at the sixth
STEPS = 28
PICTURES = (1024, 2048)  # pixels of a side
DECODED = (2048, 4096)
DECODES = 3
KILLED_AFTER = 8  # steps
# Seconds of 28 compiled steps at 1024² on H100s, as xDiT's own documentation has them.
PUBLISHED = {1: 4.30, 2: 2.60, 4: 1.63}
GIB = 2**30


def ways_to_share(world: int) -> Iterator[m.Degrees]:
    """All degrees whose product is the number of ranks."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    for ulysses, ring, cfg, pipefusion in itertools.product(divisors, repeat=4):
        fits = ulysses * ring * cfg * pipefusion == world and cfg <= 2
        if fits and (pipefusion == 1 or ulysses == ring == 1):
            yield m.Degrees(ulysses=ulysses, ring=ring, cfg=cfg, pipefusion=pipefusion)


def name_of(degrees: m.Degrees) -> str:
    """The degrees that are more than one."""
    named = {name: getattr(degrees, name) for name in ("ulysses", "ring", "cfg", "pipefusion")}
    return ", ".join(f"{name} {degree}" for name, degree in named.items() if degree > 1)


class Comparison:
    """What one GPU gave; the others are compared with that."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.forwards: dict[tuple[int, int], torch.Tensor] = {}  # by size and rows
        self.decoded: dict[int, torch.Tensor] = {}

    def parity(self, world: int, remote: RemoteRanks) -> None:
        """Forwards of one GPU are kept; those of several must equal them."""
        for number, (rows, columns, text) in enumerate(FORWARDS):
            for batch in (1, 2):
                call = make_call(rows, columns, text, batch)
                key = (number, batch)
                if world == 1:
                    self.forwards[key] = remote.run(forward_job(), call)["output"]
                    continue
                for degrees in ways_to_share(world):
                    if degrees.cfg > batch:
                        continue
                    name = f"{name_of(degrees)}, {rows}×{columns}, {batch} row(s)"
                    job = forward_job(degrees=degrees, run=name)
                    output = remote.run(job, call)["output"]
                    found = difference(output, self.forwards[key])
                    self.bench.add(f"against one GPU: {name}", found, "", SAME)

    def recorded(self, world: int, client: Client, remote: RemoteRanks) -> None:
        """What ranks repeat as one, by the way to share that they choose."""
        rows, columns, text = FORWARDS[0]
        call = make_call(rows, columns, text)
        for _ in range(REPEATED):
            output = remote.run(forward_job(), call)["output"]
        told = [t for rank in client.status().ranks for t in rank.transformers]
        for one in told:
            print(describe_transformer(one))
        name = f"{world} GPU(s): transformers without recorded forwards"
        self.bench.add(name, sum(not one.recorded for one in told), "", 0)
        if (0, 1) in self.forwards:
            found = difference(output, self.forwards[0, 1])
            self.bench.add(f"{world} GPU(s): recorded against one GPU, eager", found, "", SAME)

    def pictures(self, world: int, mode: str, remote: RemoteRanks) -> None:
        """28 steps at each size, from token ids to the latent.

        At the smallest twice: compiled forwards are recorded in the midst of the first picture.
        """
        for side in PICTURES:
            name = f"{world} GPU(s), {mode}, {side}²"
            step, took = draw(side, remote)
            self.bench.add(f"{name}: a step", step * 1e3, "ms")
            self.bench.add(f"{name}: {STEPS} steps with text", took, "s")
            if side == min(PICTURES):
                _, took = draw(side, remote)
                self.bench.add(f"{name}: {STEPS} steps with text, again", took, "s")

    def decode(self, world: int, remote: RemoteRanks) -> None:
        """Large latents to pixels, with their way to this process."""
        vae = {"vae": FINGERPRINTS["vae"]}
        job = m.Decode(components=vae, tensors=[], compute="BF16")
        for side in DECODED:
            generator = torch.Generator().manual_seed(side)
            latent = torch.randn(1, 16, side // 8, side // 8, generator=generator)
            times = []
            for _ in range(DECODES):
                began = time.perf_counter()
                image = remote.run(job, {"latent": latent})["image"]
                times.append(time.perf_counter() - began)
            self.bench.add(f"{world} GPU(s): decode at {side}²", min(times), "s")
            if world == 1:
                self.decoded[side] = image
            else:
                apart = float((image - self.decoded[side]).abs().mean())
                self.bench.add(f"{world} GPU(s): decode at {side}² against one", apart, "", 0.01)


def draw(side: int, remote: RemoteRanks) -> tuple[float, float]:
    """Seconds of a step, the median, and of a picture without its decoding."""
    ends: list[float] = []
    job = picture_job(width=side, height=side, steps=STEPS, decode=False)
    began = time.perf_counter()
    remote.run(job, make_tokens(), on_step=partial(note_time, ends))
    took = time.perf_counter() - began
    steps = [later - earlier for earlier, later in itertools.pairwise(ends[1:])]
    return statistics.median(steps), took


def judge_speed(bench: Bench) -> None:
    """Against one GPU, each with the faster of its modes, and mode by mode."""
    speeds = read_speeds({"figures": [figure.as_dict() for figure in bench.figures]})
    alone = {speed.side: speed for speed in speeds if speed.gpus == 1}
    for speed in speeds:
        if speed.gpus == 1:
            continue
        name = f"{speed.gpus} GPUs at {speed.side}²"
        if (target := targets.SPEED_UPS.get((speed.gpus, speed.side))) is not None:
            bench.meet(target, speed.speed_up)
        else:
            bench.add(f"{name}: speed-up", speed.speed_up, "×")
        one = alone[speed.side]
        modes = {"off": (one.eager, speed.eager), "auto": (one.compiled, speed.compiled)}
        for mode, (by_one, by_all) in modes.items():
            if by_one and by_all:
                bench.add(f"{name}, {mode}: speed-up", by_one / by_all, "×")


def kill_a_rank(bench: Bench, daemon: DaemonProcess, remote: RemoteRanks) -> None:
    """The last rank dies in the middle of a picture; the next one is asked for at once."""
    ranks = daemon.wait_for_status(lambda s: s.group.state == "ready", 120).ranks
    job = picture_job(width=1024, height=1024, steps=STEPS, decode=False)
    ends: list[float] = []

    def on_step(*_: object) -> None:
        note_time(ends)
        if len(ends) == KILLED_AFTER:
            assert ranks[-1].pid is not None
            os.kill(ranks[-1].pid, signal.SIGKILL)

    lost = 0
    while True:
        try:
            remote.run(job, make_tokens(), on_step=on_step)
            break
        except RankLost:
            lost = len(ends)
            bench.add("rank killed amid a picture: until told", time.perf_counter() - ends[-1], "s")
        time.sleep(0.01)
    killed = ends[KILLED_AFTER - 1]
    bench.add("rank killed amid a picture: until the next step", ends[lost] - killed, "s", 10.0)
    bench.add("rank killed amid a picture: until the next picture", ends[-1] - killed, "s")


def spread(bench: Bench, client: Client, held: list[Attachment], devices: list[str]) -> None:
    """Have all components on the other GPUs, from the first."""
    driver = CudaDriver.load()
    for number, device in enumerate(devices[1:], start=1):
        with driver.context(number):  # this process's, which is made at the first use
            driver.synchronize()
        before = read_memory({}, number).get("used", 0)
        began = time.perf_counter()
        copies = [client.copy_to(attachment, device) for attachment in held]
        took = time.perf_counter() - began
        nbytes = sum(copy.nbytes for copy in copies)
        bench.add(f"GPU {number}: all components, from GPU 0", took, "s", 1.0)
        bench.add(f"GPU {number}: rate", nbytes / took / 1e9, "GB/s")
        grown = read_memory({}, number).get("used", 0) - before
        bench.add(
            f"GPU {number}: memory grown beyond the components", (grown - nbytes) / GIB, "GiB"
        )
        for copy in copies:
            copy.release()


def main() -> int:
    """Write ``gpu-several.json`` into the directory given."""
    bench = Bench(Path(sys.argv[1]) / "gpu-several.json")
    devices = bench.devices
    wanted = {int(each) for each in os.environ.get("XDIT_GPUS", "1,2,4,8").split(",")}
    worlds = [n for n in WORLDS if n == 1 or (n in wanted and n <= len(devices))]
    chosen = os.environ.get("XDIT_COMPILE", "off,auto").split(",")
    modes = [mode for mode in MODES if mode in chosen]
    if worlds == [1]:
        print("several GPUs are needed here, and this machine shows one: nothing to measure")
        return 1
    bench.facts["gpus"] = len(devices)
    bench.facts["published"] = {str(world): seconds for world, seconds in PUBLISHED.items()}
    comparison = Comparison(bench)

    def tell(
        world: int,
        mode: str,
        daemon: DaemonProcess,
        client: Client,
        remote: RemoteRanks,
        held: list[Attachment],
    ) -> None:
        spread(bench, client, held, devices[:world])
        if mode == "off":
            comparison.parity(world, remote)
            comparison.pictures(world, mode, remote)
            comparison.decode(world, remote)
            if world > 1:
                kill_a_rank(bench, daemon, remote)
            return
        remote.run(picture_job(steps=2, decode=False), make_tokens())
        name = f"{world} GPU(s): transformers that are not compiled"
        bench.add(name, wait_until_compiled(client), "", 0)
        for side in PICTURES:  # each size is compared with eager blocks first
            job = picture_job(width=side, height=side, steps=2, decode=False)
            remote.run(job, make_tokens())
            wait_until_compiled(client, 60.0)
        comparison.pictures(world, mode, remote)
        if world > 1:
            comparison.recorded(world, client, remote)

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        for world, mode in itertools.product(worlds, modes):
            run_daemon(
                bench,
                Path(directory, f"{world}-{mode}"),
                world,
                partial(tell, world, mode),
                compiles=mode,
                device=",".join(devices[:world]),
            )
    judge_speed(bench)
    return bench.status


if __name__ == "__main__":
    sys.exit(main())
