"""What fp8 changes: a full-size forward, pictures of the model that draws digits, files in fp8.

Usage: ``python benchmarks/gpu/fp8_error.py [--tiny] OUTPUT``. ``--tiny``: the digits alone, on the
CPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from digits_scene import DigitsFiles, Request  # noqa: E402
from figures import Figure  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from flux_files import DEV, shapes_of  # noqa: E402
from flux_forward import difference, fill_randomly  # noqa: E402
from picture_scene import drawing  # noqa: E402
from xdit_sidecar.protocol import messages as m  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.fill import RegionWriter  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402

if TYPE_CHECKING:
    from full_size import Bench

FORWARDS = 5
PICTURES = 50  # at a time; a job has no more than 64
SEEDS = (2, 3)
TOLERANCE = 0.25  # of a full-size forward with random weights, relative; 0.11 was seen
VISIBLE = 1 / 8  # of a pixel, from 0 to 1: a difference that can be seen


def measure_forward(bench: FiguresFile, client: Client, remote: RemoteRanks) -> None:
    """FLUX.1-dev's shape at 1024²: relative difference, and what the rank holds of its own."""
    from full_size import forward_job, make_call

    call = make_call(128, 128, 512)
    exact, found = (
        remote.run(forward_job(fp8_matmul=fp8), call)["output"] for fp8 in (False, True)
    )
    apart = difference(found, exact)
    bench.add("a full-size forward, relative difference", apart, "", TOLERANCE)
    (rank,) = client.status().ranks
    bench.add("weights in fp8 besides the shared ones", rank.copied / 2**30, "GiB")


def measure_file(bench: Bench, client: Client, remote: RemoteRanks) -> None:
    """A file whose matrices are in fp8 against one that has the same values in bf16."""
    from full_size import describe_component, forward_job, make_call, milliseconds

    shapes = {name: list(shape) for name, shape in shapes_of(DEV).items()}
    dtypes = {name: "F8_E4M3" if len(shape) > 1 else "BF16" for name, shape in shapes.items()}
    in_fp8 = describe_component("transformer", "fp8 file", shapes, dtypes)
    in_bf16 = describe_component("transformer", "its values", shapes, dict.fromkeys(shapes, "BF16"))
    job = forward_job()

    def job_of(component: m.Component, **options: bool) -> m.Forward:
        components = {**job.components, "transformer": component.fingerprint}
        return msgspec.structs.replace(job, components=components, **options)

    call = make_call(128, 128, 512)
    with client.hand_over(in_fp8, bench.device, fill_randomly) as stored:
        values = stored.tensors()
        with client.hand_over(in_bf16, bench.device, partial(copy_values, values=values)):
            found, expected = (
                remote.run(job_of(each), call)["output"] for each in (in_fp8, in_bf16)
            )
            # Each weight is cast when it is used, and bf16 has all values of e4m3.
            apart = difference(found, expected)
            bench.add("a file in fp8 against its values in bf16", apart, "", 0.0)
            for name, component in (("fp8", in_fp8), ("bf16", in_bf16)):
                nbytes = sum(spec.nbytes for spec in component.tensors)
                bench.add(f"weights of the {name} file", nbytes / 1e9, "GB")
                took = milliseconds(partial(remote.run, job_of(component), call), FORWARDS)
                bench.add(f"forward at 1024² of the {name} file, eager", took, "ms")
            before = client.status().ranks[0].copied
            remote.run(job_of(in_fp8, fp8_matmul=True), call)
            took = milliseconds(
                partial(remote.run, job_of(in_fp8, fp8_matmul=True), call), FORWARDS
            )
            bench.add("forward at 1024² of the fp8 file, fp8 products, eager", took, "ms")
            grown = client.status().ranks[0].copied - before
            bench.add("weights in fp8 besides those of the fp8 file", grown / 2**30, "GiB", 0.01)
        del values


def copy_values(writer: RegionWriter, values: Mapping[str, torch.Tensor]) -> None:
    """The same numbers in other dtypes."""
    for name, view in writer.tensors().items():
        view.copy_(values[name])


def measure_pictures(bench: FiguresFile, client: Client, at_a_time: int) -> None:
    """How many digits are read rightly with either, and how far the pictures are apart."""
    count = at_a_time * len(SEEDS)
    pictures = {}
    with drawing(client, DigitsFiles()) as drawer:
        for name, fp8 in (("bf16", False), ("fp8", True)):
            settings = {"compute": "BF16", "fp8_matmul": fp8}
            requests = [Request(at_a_time, seed, settings) for seed in SEEDS]
            drawn = [request.draw(drawer) for request in requests]
            right = sum(r.count_read(d) for r, d in zip(requests, drawn, strict=True))
            pictures[name] = torch.cat(drawn)
            bench.keep(Figure(f"read rightly of {count}, {name}", right, "", 0.9 * count, True))
    apart = (pictures["fp8"] - pictures["bf16"]).abs()
    bench.add("pictures apart, mean of a pixel from 0 to 1", float(apart.mean()), "")
    bench.add("pixels apart by an eighth and more", float((apart > VISIBLE).float().mean()), "")


def main() -> int:
    """Write ``gpu-fp8-error.json`` into the directory given."""
    tiny = "--tiny" in sys.argv
    (target,) = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    output = Path(target) / "gpu-fp8-error.json"
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        if tiny:
            bench = FiguresFile(output)
        else:
            from full_size import Bench, run_daemon

            bench = Bench(output)

            def story(
                daemon: DaemonProcess, client: Client, remote: RemoteRanks, held: list[Attachment]
            ) -> None:
                measure_forward(bench, client, remote)
                measure_file(bench, client, remote)

            run_daemon(bench, directory / "full", 1, story)
            torch.cuda.empty_cache()
        device = "cpu" if tiny else "cuda"
        digits = directory / "digits"
        digits.mkdir()
        with (
            running_daemon(digits, "--ranks", "1", device=device) as daemon,
            daemon.client("bench") as client,
        ):
            daemon.wait_for_status(lambda s: s.group.state == "ready", 120)
            measure_pictures(bench, client, 5 if tiny else PICTURES)
    return bench.status


if __name__ == "__main__":
    sys.exit(main())
