"""FLUX.1-dev at full size on a real GPU: weights in a shared region, forwards from views of it.

Random bf16 weights lie in one region of the daemon (CUDA IPC). One process runs the forward on
views; the same layers with weights of their own are the reference; then two rank processes on this
one GPU (gloo, ulysses 2) attach the same region and must give the same output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

import torch  # noqa: E402
from daemon_process import running_daemon  # noqa: E402
from figures import Figure  # noqa: E402
from flux_files import DEV, shapes_of  # noqa: E402
from machine import describe_run  # noqa: E402
from xdit_sidecar.daemon.models.flux_detection import detect_flux  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.fill import RegionWriter  # noqa: E402
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out  # noqa: E402
from xdit_sidecar.protocol.messages import Component  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402

FINGERPRINT = "bytes:" + "f" * 64
SIZES = [
    (64, 64, 512),
    (63, 61, 509),
]  # latent cells and text tokens; the second divides by nothing
STEPS = 5


def make_component() -> Component:
    """Names, shapes and places of FLUX.1-dev in the layout of its single file, bf16."""
    specs = [TensorSpec(name, "BF16", list(shape)) for name, shape in shapes_of(DEV).items()]
    return Component(
        fingerprint=FINGERPRINT, role="transformer", label="FLUX.1 dev", tensors=lay_out(specs)
    )


def fill_randomly(writer: RegionWriter) -> None:
    """Weights that keep activations of order one; norms' scales are one. Any dtype."""
    generator = torch.Generator("cuda").manual_seed(0)
    for name, view in writer.tensors().items():
        if name.endswith(".scale"):
            view.fill_(1.0)
        else:
            # torch has no random numbers in fp8.
            values = view if view.itemsize > 1 else torch.empty_like(view, dtype=torch.bfloat16)
            values.normal_(0.0, 0.02 if view.ndim > 1 else 0.01, generator=generator)
            if values is not view:
                view.copy_(values)


def make_inputs(rows: int, columns: int, text: int) -> dict[str, torch.Tensor]:
    """One forward's inputs, the same in every process."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = torch.cat([torch.zeros(len(grid), 1), grid], 1).to("cuda")
    return {
        "hidden_states": normal(1, rows * columns, DEV.inputs),
        "encoder_hidden_states": normal(1, text, DEV.context),
        "pooled_projections": normal(1, DEV.pooled),
        "timestep": torch.tensor([0.7], device="cuda"),
        "guidance": torch.tensor([3.5], device="cuda"),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, device="cuda"),
    }


def build(tensors: dict[str, torch.Tensor]):
    """The loaded model around tensors by their names in the file."""
    from xdit_sidecar.daemon.ranks.flux.model import build_flux

    config = detect_flux(make_component().tensors, "FLUX.1 dev")
    return build_flux(config, tensors, torch.bfloat16)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference, as a ratio of norms."""
    assert torch.isfinite(found).all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def rank_main(directory: Path, runtime_dir: str, rank: int, world: int) -> None:
    """One of the ranks: attach, join, forward each size, save what came out."""
    from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

    device = torch.device("cuda", 0)
    load_xfuser(device)
    from xdit_sidecar.daemon.ranks.parallel import process_group
    from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
    from xdit_sidecar.daemon.ranks.parallel.contexts import ParallelContext
    from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux

    with Client(runtime_dir, name=f"rank{rank}") as client:
        attachment = client.attach(FINGERPRINT, CudaDriver.load().device_uuid(0))
        assert attachment is not None
        flux = ParallelFlux(build(attachment.tensors()).model)
        group = process_group.join(
            rank=rank,
            world_size=world,
            device=device,
            backend="gloo",
            meeting_file=directory / "meeting",
            deadline=60.0,
        )
        context = ParallelContext.build(ParallelConfig(ulysses=world), group)
        for number, size in enumerate(SIZES):
            with torch.no_grad():
                output = flux.forward(context, FluxInputs(**make_inputs(*size)))
            torch.cuda.synchronize()
            if rank == 0:
                (directory / f"output{number}").write_bytes(output.float().cpu().numpy().tobytes())
        process_group.leave()
        del flux
        attachment.release()


def run_ranks(directory: Path, runtime_dir: Path, world: int) -> list[torch.Tensor]:
    """What ``world`` ranks on this GPU compute, one output per size."""
    command = [sys.executable, __file__, "--rank", str(directory), str(runtime_dir)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world)], env=os.environ) for rank in range(world)
    ]
    statuses = [rank.wait(240) for rank in ranks]
    assert statuses == [0] * world, statuses
    outputs = []
    for number, (rows, columns, _) in enumerate(SIZES):
        data = bytearray((directory / f"output{number}").read_bytes())
        outputs.append(torch.frombuffer(data, dtype=torch.float32).reshape(1, rows * columns, -1))
    return outputs


def measure(directory: Path) -> list[Figure]:
    """Everything, in one daemon's life."""
    figures: list[Figure] = []

    def add(name: str, value: float, unit: str, limit: float | None = None) -> None:
        figures.append(Figure(name, value, unit, limit))
        print(figures[-1], flush=True)

    uuid = CudaDriver.load().device_uuid(0)
    component = make_component()
    with running_daemon(directory, device="cuda") as daemon, daemon.client("main") as client:
        began = time.perf_counter()
        attachment = client.hand_over(component, uuid, fill_randomly)
        add("weights filled and committed", time.perf_counter() - began, "s")
        began = time.perf_counter()
        loaded = build(attachment.tensors())
        add("model built around them", time.perf_counter() - began, "s")
        add("bytes copied", loaded.copied_bytes / 1e6, "MB", 40.0)
        add("bytes shared", loaded.shared_bytes / 1e9, "GB")

        with torch.no_grad():
            outputs = [loaded.model(**make_inputs(*s), return_dict=False)[0] for s in SIZES]
            inputs = make_inputs(*SIZES[0])
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(STEPS):
                loaded.model(**inputs, return_dict=False)
            torch.cuda.synchronize()
        add("forward at 1024², eager", (time.perf_counter() - began) / STEPS * 1e3, "ms")

        copied = build({name: view.clone() for name, view in attachment.tensors().items()})
        with torch.no_grad():
            for size, output in zip(SIZES, outputs, strict=True):
                own = copied.model(**make_inputs(*size), return_dict=False)[0]
                add(f"against weights of its own, {size}", difference(output, own), "", 0.0)
        del copied, own
        torch.cuda.empty_cache()

        for size, output, found in zip(
            SIZES, outputs, run_ranks(directory, daemon.runtime_dir, 2), strict=True
        ):
            # bf16 rounds at 2**-8; summation order differs between one rank and two.
            add(f"two ranks against one, {size}", difference(found, output.cpu()), "", 0.02)
        del loaded
        attachment.release()
    return figures


def main() -> int:
    """Write ``gpu-flux-forward.json`` into the directory given."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        figures = measure(Path(directory))
    result = {**describe_run(), "figures": [figure.as_dict() for figure in figures]}
    (Path(sys.argv[1]) / "gpu-flux-forward.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank_main(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        sys.exit(0)
    sys.exit(main())
