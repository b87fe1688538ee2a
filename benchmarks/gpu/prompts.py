"""300 prompts of 4 steps by two clients at once, sizes from 512² to 1024² mixed: memory stays flat.

From token ids to pixels, each with a prompt of its own. After each round nothing runs until the
ranks have returned what they do not use; then device and host memory are read. What has grown is
the last reading beyond the one after which every size had been drawn twice.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import psutil  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from full_size import (  # noqa: E402
    Bench,
    make_tokens,
    picture_job,
    run_compiled,
)
from xdit_sidecar.daemon.keeper.nvml import used_bytes  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402
from xdit_sidecar.protocol.errors import SidecarError  # noqa: E402

PROMPTS = 300
ROUNDS = 6
BEFORE = 2  # rounds until memory must be flat
STEPS = 4
SIDES = (512, 640, 768, 896, 1024)
SIZES = [(width, height) for width in SIDES for height in SIDES]
CLIENTS = 2
EACH = PROMPTS // ROUNDS // CLIENTS  # prompts of a client in a round
IDLE_SECONDS = 4.0  # the ranks return cached memory after two
COMPILE_SECONDS = 90.0
LATEST_SECONDS = 340.0  # no round begins after so long
MIB = 2**20


def draw_all(remote: RemoteRanks, client: int, number: int) -> int:
    """One client's prompts of a round, of every size; how many gave a picture."""
    done = 0
    for at in range(EACH):
        # The two go through the sizes in opposite directions.
        width, height = SIZES[at % len(SIZES)] if client == 0 else SIZES[-1 - at % len(SIZES)]
        seed = (number * CLIENTS + client) * EACH + at
        job = picture_job(width=width, height=height, steps=STEPS, seed=seed)
        try:
            image = remote.run(job, make_tokens(seed))["image"]
        except SidecarError as error:
            print(f"client {client}, {width}×{height}: {error!r}", flush=True)
            continue
        done += image.shape == (1, height, width, 3) and bool(torch.isfinite(image).all())
    return done


def read_memory(bench: Bench, daemon: DaemonProcess) -> tuple[int, int]:
    """Bytes in use on the GPU by anybody, and in host memory by the daemon and its children."""
    device = used_bytes(bench.device)
    assert device is not None, "NVML is needed to count device memory"
    broker = psutil.Process(daemon.pid)
    family = [broker, *broker.children(recursive=True)]
    host = 0
    for process in family:
        with suppress(psutil.NoSuchProcess):  # the compiler's end by themselves
            host += process.memory_full_info().pss
    return device, host


def measure(
    bench: Bench, daemon: DaemonProcess, client: Client, remotes: list[RemoteRanks]
) -> None:
    """All rounds."""
    began = time.monotonic()
    done = 0
    readings = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(ROUNDS):
            if time.monotonic() - began > LATEST_SECONDS:
                print("no time is left for another round", flush=True)
                break
            rounds = [
                pool.submit(draw_all, remote, which, number) for which, remote in enumerate(remotes)
            ]
            done += sum(each.result() for each in rounds)
            wait_until_compiled(client, COMPILE_SECONDS)  # what a size of this round needed
            time.sleep(IDLE_SECONDS)
            readings.append(read_memory(bench, daemon))
            device, host = readings[-1]
            bench.add(f"round {number + 1}: device memory", device / MIB, "MiB")
            bench.add(f"round {number + 1}: host memory", host / MIB, "MiB")
    bench.add("prompts that gave a picture", done, "")
    bench.add("seconds in all", time.monotonic() - began, "s")
    # What did not run is no picture either.
    bench.meet(targets.PROMPTS_ERRORS, PROMPTS - done)
    (device, host), (last_device, last_host) = readings[BEFORE - 1], readings[-1]
    bench.meet(targets.PROMPTS_DEVICE, (last_device - device) / MIB)
    bench.meet(targets.PROMPTS_HOST, (last_host - host) / MIB)


def main() -> int:
    """Write ``gpu-prompts.json`` into the directory given."""
    bench = Bench(Path(sys.argv[1]) / "gpu-prompts.json")

    def story(
        daemon: DaemonProcess, client: Client, remote: RemoteRanks, held: list[Attachment]
    ) -> None:
        remote.run(picture_job(steps=1), make_tokens())
        bench.add("transformers not compiled yet", wait_until_compiled(client, COMPILE_SECONDS), "")
        with daemon.client("other") as other:
            measure(bench, daemon, client, [remote, RemoteRanks(other)])

    return run_compiled(bench, story)


if __name__ == "__main__":
    sys.exit(main())
