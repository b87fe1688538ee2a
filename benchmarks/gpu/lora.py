"""Forwards of FLUX.1-dev at 1024² with a LoRA beside every layer, eager and compiled.

On one GPU, and on all that there are.

Usage: ``python benchmarks/gpu/lora.py OUTPUT``.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from figures import Figure  # noqa: E402
from flux_files import DEV  # noqa: E402
from flux_forward import difference, fill_randomly  # noqa: E402
from full_size import (  # noqa: E402
    SAME,
    Bench,
    forward_job,
    make_call,
    make_component,
    milliseconds,
    run_daemon,
)
from lora_files import weights_of  # noqa: E402
from xdit_sidecar.protocol import messages as m  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402

RANK = 16
STRENGTH = 4.0  # a third of what the random weights do
FORWARDS = 10
WARM = 8  # a recording is made at the sixth


def make_lora() -> m.Component:
    """A pair for each linear layer."""
    shapes = {}
    for name, (rows, columns) in weights_of(DEV).items():
        shapes[f"{name}.down"], shapes[f"{name}.up"] = [RANK, columns], [rows, RANK]
    return make_component("lora", shapes, "BF16")


def measure(
    bench: Bench,
    devices: list[str],
    mode: m.Compile,
    outputs: dict[str, torch.Tensor],
    daemon: DaemonProcess,
    client: Client,
    remote: RemoteRanks,
    held: list[Attachment],
) -> None:
    """Times with the LoRA and without; what each gives against one GPU, eagerly."""
    held.append(client.hand_over(make_lora(), bench.device, fill_randomly))
    copies = [client.copy_to(each, device) for device in devices[1:] for each in held]
    call = make_call(128, 128, 512)
    adapter = m.Adapter(held[-1].component.fingerprint, STRENGTH)
    for how, job in (("no LoRA", forward_job()), ("LoRA", forward_job(adapters=[adapter]))):
        name = f"{len(devices)} GPU(s), {mode}, {how}"
        remote.run(job, call)
        if mode == "auto":
            eager = wait_until_compiled(client)
            bench.add(f"{name}: transformers that are not compiled", eager, "", 0)
        for _ in range(WARM):
            output = remote.run(job, call)["output"]
        took = milliseconds(partial(remote.run, job, call), FORWARDS)
        bench.add(f"{name}: a forward", took, "ms")
        apart = difference(output, outputs.setdefault(how, output))
        bench.add(f"{name}: against one GPU, eager", apart, "", SAME)
    apart = difference(outputs["LoRA"], outputs["no LoRA"])
    name = f"{len(devices)} GPU(s), {mode}: what the LoRA changes"
    bench.keep(Figure(name, apart, "", 5 * SAME, at_least=True))
    for copy in copies:
        copy.release()


def main() -> int:
    """Write ``gpu-lora.json`` into the directory given."""
    bench = Bench(Path(sys.argv[1]) / "gpu-lora.json")
    outputs: dict[str, torch.Tensor] = {}
    modes: tuple[m.Compile, ...] = ("off", "auto")
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        for world in sorted({1, len(bench.devices)}):
            used = bench.devices[:world]
            for mode in modes:
                run_daemon(
                    bench,
                    Path(directory, f"{world}-{mode}"),
                    world,
                    partial(measure, bench, used, mode, outputs),
                    compiles=mode,
                    device=",".join(used),
                )
    return bench.status


if __name__ == "__main__":
    sys.exit(main())
