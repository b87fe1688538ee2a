"""FLUX.1-dev, its VAE and its text encoders at full size in a daemon on a real GPU, random weights.

What the stages that need them share: the components, one forward's arguments, a daemon with
everything handed over, and where figures go.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from demo_files import autoencoder_shapes, clip_l_shapes, t5_shapes  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from flux_files import DEV, shapes_of  # noqa: E402
from flux_forward import fill_randomly  # noqa: E402
from xdit_sidecar.protocol import messages as m  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402

Tensors = dict[str, torch.Tensor]
Story = Callable[[DaemonProcess, Client, RemoteRanks, list[Attachment]], None]


def make_component(role: str, shapes: dict[str, list[int]], dtype: str) -> m.Component:
    """A component of these tensors, known by its role."""
    return describe_component(role, f"random {role}", shapes, dict.fromkeys(shapes, dtype))


def describe_component(
    role: str, label: str, shapes: dict[str, list[int]], dtypes: dict[str, str]
) -> m.Component:
    """A component of tensors of several dtypes, known by its label."""
    specs = [TensorSpec(name, dtypes[name], list(shape)) for name, shape in shapes.items()]
    digest = hashlib.sha256(label.encode()).hexdigest()
    return m.Component(
        fingerprint=f"bytes:{digest}", role=role, label=label, tensors=lay_out(specs)
    )


COMPONENTS = [
    make_component("transformer", {n: list(s) for n, s in shapes_of(DEV).items()}, "BF16"),
    make_component("vae", autoencoder_shapes(), "BF16"),
    make_component("clip_l", clip_l_shapes(), "F16"),
    make_component("t5", t5_shapes(layers=24, width=4096, heads=64, mlp=10240), "F16"),
]
# Two bf16 forwards that round at different places: 0.0176 was measured with random weights.
SAME = 0.03
FINGERPRINTS = {component.role: component.fingerprint for component in COMPONENTS}


class Bench(FiguresFile):
    """One run: its figures, and the GPUs; ``device`` is the first of ``devices``."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        driver = CudaDriver.load()
        self.devices = [driver.device_uuid(each) for each in range(driver.device_count())]
        self.device = self.devices[0]

    def hand_over(self, client: Client) -> list[Attachment]:
        """All components, made on the GPU."""
        return [client.hand_over(c, self.device, fill_randomly) for c in COMPONENTS]


def make_call(rows: int, columns: int, text: int, batch: int = 1) -> Tensors:
    """ComfyUI's arguments of one forward, on the GPU; latent rows and columns, text tokens."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)

    return {
        "x": normal(batch, 16, rows, columns),
        "timestep": torch.full((batch,), 0.7, device="cuda"),
        "context": normal(batch, text, DEV.context),
        "y": normal(batch, DEV.pooled),
        "guidance": torch.full((batch,), 3.5, device="cuda"),
    }


def make_tokens(seed: int = 1) -> Tensors:
    """Random token ids of a prompt, for both text encoders."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "clip_l_ids": torch.randint(0, 49406, (1, 77), generator=generator),
        "t5_ids": torch.randint(0, 32000, (1, 512), generator=generator),
    }


def forward_job(**options: object) -> m.Forward:
    """A forward in bf16."""
    components = {"transformer": FINGERPRINTS["transformer"]}
    return m.Forward(components=components, tensors=[], compute="BF16", **options)  # type: ignore[arg-type]


def picture_job(**options: object) -> m.Generate:
    """A picture in bf16, from token ids to pixels."""
    return m.Generate(components=FINGERPRINTS, tensors=[], compute="BF16", **options)  # type: ignore[arg-type]


def milliseconds(action: Callable[[], object], count: int) -> float:
    """The median of ``count`` calls."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def note_time(ends: list[float], *_: object) -> None:
    """For ``on_step``: when each step ended."""
    ends.append(time.perf_counter())


def run_daemon(
    bench: Bench,
    directory: Path,
    ranks: int,
    story: Story,
    *more: str,
    compiles: str = "off",
    device: str = "cuda",
) -> None:
    """A daemon with everything handed over, for the length of a story; ``more`` are its options."""
    directory.mkdir()
    options = ("--ranks", str(ranks), "--deadline", "120", "--compile", compiles, *more)
    with running_daemon(directory, *options, device=device) as daemon:
        try:
            with daemon.client("bench") as client:
                began = time.perf_counter()
                held = bench.hand_over(client)
                remote = RemoteRanks(client)
                remote.wait_until_ready()
                bench.add(f"{ranks} rank(s): ready with weights", time.perf_counter() - began, "s")
                story(daemon, client, remote, held)
                for attachment in held:
                    attachment.release()
        except BaseException:
            print(daemon.log[-6000:])
            raise


def run_compiled(bench: Bench, story: Story, *more: str) -> int:
    """A story of one rank that compiles, in a daemon of its own; the stage's exit status."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        run_daemon(bench, Path(directory, "one"), 1, story, *more, compiles="auto")
    return bench.status
