"""The first picture at a size that the ranks have not seen, against later ones of that size.

One rank that compiles, 1024² known to it. A first picture of another size, from token ids to
pixels; then the idle moment in which the rank may compile for it; then the same again.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import targets  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from full_size import (  # noqa: E402
    Bench,
    make_tokens,
    picture_job,
    run_compiled,
)
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402

KNOWN = (1024, 1024)
NEW = [(768, 1344), (1216, 832), (512, 512), (1000, 776), (1536, 1024)]  # width, height in pixels
STEPS = 8
LATER = 3
IDLE_SECONDS = 3.0  # more than the ranks wait before they compile


def draw(remote: RemoteRanks, size: tuple[int, int]) -> float:
    """Seconds of a picture."""
    width, height = size
    began = time.perf_counter()
    image = remote.run(picture_job(width=width, height=height, steps=STEPS), make_tokens())["image"]
    took = time.perf_counter() - began
    assert image.shape == (1, height, width, 3), image.shape
    return took


def measure(bench: Bench, client: Client, remote: RemoteRanks) -> None:
    """All sizes, and the worst of them."""
    draw(remote, KNOWN)
    bench.add("transformers that are not compiled", wait_until_compiled(client), "", 0)
    bench.add("1024² again", statistics.median(draw(remote, KNOWN) for _ in range(LATER)), "s")
    beyond = []
    for size in NEW:
        first = draw(remote, size)
        time.sleep(IDLE_SECONDS)
        wait_until_compiled(client, 60.0)
        later = statistics.median(draw(remote, size) for _ in range(LATER))
        bench.add(f"{size[0]}×{size[1]}: first", first, "s")
        bench.add(f"{size[0]}×{size[1]}: later", later, "s")
        beyond.append(first - later)
    bench.meet(targets.NEW_SIZE, max(beyond))


def main() -> int:
    """Write ``gpu-sizes.json`` into the directory given."""
    bench = Bench(Path(sys.argv[1]) / "gpu-sizes.json")

    def story(
        daemon: DaemonProcess, client: Client, remote: RemoteRanks, held: list[Attachment]
    ) -> None:
        measure(bench, client, remote)

    return run_compiled(bench, story)


if __name__ == "__main__":
    sys.exit(main())
