"""What products in fp8 change: a full-size forward, and pictures of the model that draws digits.

Usage: ``python benchmarks/gpu/fp8_error.py [--tiny] OUTPUT``. ``--tiny``: the digits alone, on the
CPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from digits_scene import DigitsFiles, Request  # noqa: E402
from figures import Figure  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from picture_scene import drawing  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402

PICTURES = 50  # at a time; a job has no more than 64
SEEDS = (2, 3)
TOLERANCE = 0.25  # of a full-size forward with random weights, relative; 0.11 was seen
DARK = 1 / 8  # of a pixel, from 0 to 1: a difference that can be seen


def measure_forward(bench: FiguresFile, client: Client, remote: RemoteRanks) -> None:
    """FLUX.1-dev's shape at 1024²: relative difference, and what the rank holds of its own."""
    from full_size import forward_job, make_call

    call = make_call(128, 128, 512)
    exact, found = (
        remote.run(forward_job(fp8_matmul=fp8), call)["output"].float() for fp8 in (False, True)
    )
    difference = float((found - exact).norm() / exact.norm())
    bench.add("a full-size forward, relative difference", difference, "", TOLERANCE)
    (rank,) = client.status().ranks
    bench.add("weights in fp8 besides the shared ones", rank.copied / 2**30, "GiB")


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
    bench.add("pixels apart by an eighth and more", float((apart > DARK).float().mean()), "")


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
