"""A step at 1024² by the ranks against stock ComfyUI: one server, one GPU, one run.

The stock workflow, first with ComfyUI's own loaders, then with ours and compiled ranks, at last
with products in fp8. A step is what a prompt with more steps takes longer than one with few,
divided by their number: loading, encoding and saving cancel out.

Usage: ``python benchmarks/gpu/steps.py [--tiny] OUTPUT``. ``--tiny``: the tests' small files, on
the CPU, not compiled.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# ComfyUI chooses its allocator itself.
for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
    os.environ.pop(name, None)
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import targets  # noqa: E402
from comfyui import workflows  # noqa: E402
from comfyui.server import ComfyServer  # noqa: E402
from comfyui.workflows import Nodes  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import running_daemon  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from pack_comfyui import find_checkouts  # noqa: E402
from real_comfyui import Case, Setup, make_server, set_up  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402

FEW, MANY = 4, 24
ROUNDS = 3
PROMPT_SECONDS = 150.0


def run(server: ComfyServer, setup: Setup, nodes: Nodes, steps: int, seed: int) -> float:
    """Seconds of a prompt until its latent is saved."""
    settings = replace(setup.settings, steps=steps, seed=seed)
    workflow = workflows.text_to_image(nodes, settings, picture=False, save=f"steps{steps}")
    began = time.perf_counter()
    server.run(workflow, seconds=PROMPT_SECONDS)
    return time.perf_counter() - began


def step_milliseconds(server: ComfyServer, setup: Setup, nodes: Nodes) -> float:
    """The median of rounds; the workflow has run before, so that everything is loaded."""
    times = []
    for number in range(ROUNDS):
        few, many = (run(server, setup, nodes, steps, 10 + number) for steps in (FEW, MANY))
        times.append((many - few) / (MANY - FEW) * 1e3)
    return statistics.median(times)


def measure_ranks(
    output: FiguresFile, server: ComfyServer, setup: Setup, client: Client, dtype: str = ""
) -> float:
    """A step by the ranks, compiled if that is wanted, in the loader's ``dtype``."""
    nodes = setup.shared
    if dtype:
        nodes = replace(nodes, model_inputs={**nodes.model_inputs, "weight_dtype": dtype})
    how = f", {dtype}" if dtype else ""
    run(server, setup, nodes, FEW, 1)
    if not setup.tiny:
        missing = wait_until_compiled(client)
        output.add(f"transformers that are not compiled{how}", missing, "", 0)
        run(server, setup, nodes, FEW, 2)
    took = step_milliseconds(server, setup, nodes)
    output.add(f"the ranks' step at 1024²{how}", took, "ms")
    return took


def measure(output: FiguresFile, setup: Setup, case: Case, directory: Path) -> None:
    """Stock, then the ranks."""
    options = ("--ranks", "1", "--deadline", "120", "--compile", "off" if setup.tiny else "auto")
    with (
        running_daemon(directory, *options, device=setup.device) as daemon,
        daemon.client("bench") as client,
        make_server(setup, case, daemon, directory / "base") as server,
    ):
        daemon.wait_for_status(lambda s: s.group.state == "ready", 120)
        run(server, setup, setup.stock, FEW, 1)
        stock = step_milliseconds(server, setup, setup.stock)
        output.add("stock ComfyUI's step at 1024²", stock, "ms")
        output.meet(targets.STOCK, stock / measure_ranks(output, server, setup, client))
        fp8 = measure_ranks(output, server, setup, client, "fp8_e4m3fn_fast")
        output.meet(targets.STOCK_FP8, stock / fp8)


def main() -> int:
    """Write ``gpu-steps.json`` into the directory given; with the newest ComfyUI there is."""
    tiny = "--tiny" in sys.argv
    (target,) = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    output = FiguresFile(Path(target) / "gpu-steps.json")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        newest, *_ = find_checkouts(directory)
        case = Case(newest)
        output.facts["comfyui"] = case.version
        measure(output, set_up(tiny, directory / "models"), case, directory)
    return output.status


if __name__ == "__main__":
    sys.exit(main())
