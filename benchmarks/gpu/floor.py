"""A step at 1024² by a compiled rank against the card's floor, and what the time goes to.

The floor is the step's arithmetic (74.4 TFLOP) at the rate that one large bf16 product reaches here
and now. What holds a step back is told by the same products and the same attention alone, one after
another in this process; the rest is what lies between them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "tests"), str(ROOT / "examples")]

import targets  # noqa: E402
import torch  # noqa: E402
from compiled_ranks import wait_until_compiled  # noqa: E402
from daemon_process import DaemonProcess  # noqa: E402
from flux_files import DEV  # noqa: E402
from flux_work import Multiplication, attention_flop, list_multiplications  # noqa: E402
from full_size import (  # noqa: E402
    Bench,
    forward_job,
    make_call,
    milliseconds,
    run_compiled,
)
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402

FORWARDS = 50
REPEATS = 20
IN_A_ROW = 10  # calls that are timed together: alone, a small product is over before it is told
SQUARE = Multiplication(1, 8192, 8192, 8192)
ROWS, COLUMNS, TEXT = 128, 128, 512  # cells of the latent of 1024² pixels, text tokens
IMAGE = ROWS // 2 * COLUMNS // 2


def normal(*shape: int) -> torch.Tensor:
    """Random bf16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def multiply_milliseconds(shape: Multiplication) -> float:
    """Of one of these products, in a row of them with weights of their own, as blocks have."""
    tokens = normal(shape.rows, shape.inner)
    weights = [normal(shape.columns, shape.inner) for _ in range(IN_A_ROW)]

    def multiply() -> None:
        for weight in weights:
            functional.linear(tokens, weight)

    multiply()
    return milliseconds(multiply, REPEATS) / IN_A_ROW


def attend_milliseconds(tokens: int) -> float:
    """Of one block's attention, by the kernel that ranks take."""
    parts = [normal(1, tokens, DEV.heads, DEV.head_size).transpose(1, 2) for _ in range(3)]

    def attend() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for _ in range(IN_A_ROW):
                functional.scaled_dot_product_attention(*parts)

    attend()
    return milliseconds(attend, REPEATS) / IN_A_ROW


def measure(bench: Bench, client: Client, remote: RemoteRanks) -> None:
    """The step, then the card, while the rank waits."""
    call = make_call(ROWS, COLUMNS, TEXT)

    def step() -> torch.Tensor:
        return remote.run(forward_job(), call)["output"].to("cuda")

    step()
    bench.add("transformers that are not compiled", wait_until_compiled(client), "", 0)
    milliseconds(step, 3)
    took = milliseconds(step, FORWARDS)
    bench.add("step at 1024², compiled", took, "ms")

    products = list_multiplications(DEV, IMAGE, TEXT)
    blocks = DEV.double + DEV.single
    flop = sum(each.flop for each in products) + attention_flop(DEV, IMAGE + TEXT)
    rate = SQUARE.flop / multiply_milliseconds(SQUARE) * 1e3
    floor = flop / rate * 1e3
    bench.add("arithmetic of a step", flop / 1e12, "TFLOP")
    bench.add("matrix rate, bf16, 8192³", rate / 1e12, "TFLOP/s")
    bench.add("floor", floor, "ms")
    bench.meet(targets.FLOOR, took / floor)

    multiplying = sum(each.count * multiply_milliseconds(each) for each in products)
    attending = blocks * attend_milliseconds(IMAGE + TEXT)
    bench.add("of a step: its products alone", multiplying, "ms")
    bench.add("of a step: its attention alone", attending, "ms")
    bench.add("of a step: all else", took - multiplying - attending, "ms")


def main() -> int:
    """Write ``gpu-floor.json`` into the directory given."""
    bench = Bench(Path(sys.argv[1]) / "gpu-floor.json")

    def story(
        daemon: DaemonProcess, client: Client, remote: RemoteRanks, held: list[Attachment]
    ) -> None:
        measure(bench, client, remote)

    return run_compiled(bench, story)


if __name__ == "__main__":
    sys.exit(main())
