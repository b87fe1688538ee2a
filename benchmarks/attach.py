"""Attaching a resident component of 1,000 tensors and 2 GB: from the call to usable tensors."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from daemon_process import running_daemon
from figures import Figure, percentile
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out
from xdit_sidecar.protocol.messages import Component

TENSORS = 1000
ELEMENTS = 1000  # by 1000 each, bf16: 2 MB a tensor
ROUNDS = 50


def measure() -> list[Figure]:
    """Hand-over once, attach many times."""
    specs = lay_out(
        TensorSpec(f"blocks.{i}.weight", "BF16", [ELEMENTS, 1000]) for i in range(TENSORS)
    )
    component = Component(
        fingerprint="bytes:" + "0" * 64, role="transformer", label="2 GB", tensors=specs
    )
    import torch  # noqa: F401  clients have it loaded; its import is not part of an attach

    block = bytes(range(256)) * 2**14
    times = []
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        running_daemon(Path(directory)) as daemon,
        daemon.client("filler") as filler,
        daemon.client("attacher") as attacher,
    ):

        def fill(writer) -> None:
            for offset in range(0, writer.mapping.nbytes - len(block) + 1, len(block)):
                writer.write(offset, block)

        began = time.perf_counter()
        filler.hand_over(component, "cpu", fill).release()
        filled = time.perf_counter() - began
        for _ in range(ROUNDS):
            began = time.perf_counter()
            attachment = attacher.attach(component.fingerprint, "cpu")
            assert attachment is not None
            tensors = attachment.tensors()
            times.append(time.perf_counter() - began)
            assert len(tensors) == TENSORS
            del tensors
            attachment.release()
    return [
        Figure("hand-over of 2 GB from host memory", filled, "s"),
        Figure("attach 1,000 tensors / 2 GB p50", percentile(times, 50) * 1e3, "ms", 20.0),
        Figure("attach 1,000 tensors / 2 GB p99", percentile(times, 99) * 1e3, "ms"),
    ]
