"""Sharing on a real GPU: what a hand-over, an attach and each death cost, and how many copies.

A client under ComfyUI's allocator (cudaMallocAsync) hands over random weights of the sizes of
FLUX's VAE, CLIP-L and T5-XXL; other processes attach. Prints a table, writes JSON.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

import torch  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from targets import ATTACH, COPIES, HAND_OVER, HAND_OVER_FROM_HOST  # noqa: E402
from xdit_sidecar.daemon.keeper.nvml import used_bytes  # noqa: E402
from xdit_sidecar.protocol.client.attachment import Attachment  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.messages import Component, DeviceStatus  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402
from xdit_sidecar.protocol.regions.views import describe_tensors  # noqa: E402

# (role, tensors, bytes each in bf16): the counts and sizes of the real files, rounded.
SHAPES = [
    ("vae", 244, 688_000),
    ("text_encoder", 196, 1_255_000),
    ("text_encoder", 219, 43_500_000),
]
GIB = 2**30

ATTACHER = """
import sys, time, torch
from xdit_sidecar.protocol.client.client import Client
torch.cuda.init(); torch.zeros(1, device="cuda"); torch.cuda.synchronize()
with Client(sys.argv[1], name="attacher") as client:
    client.ping()
    began = time.perf_counter()
    attachments = [client.attach(f, sys.argv[2]) for f in sys.argv[3].split(",")]
    tensors = [a.tensors() for a in attachments]
    took = time.perf_counter() - began
    print(took, sum(float(t.sum(dtype=torch.float64)) for ts in tensors for t in ts.values()),
          torch.cuda.get_allocator_backend(), flush=True)
    sys.stdin.readline()
    del tensors
    for a in attachments:
        a.release()
"""


def make_components(device: str) -> list[tuple[Component, dict[str, torch.Tensor]]]:
    """Random weights on ``device`` ("cuda" or "cpu"), as components."""
    made = []
    for number, (role, count, nbytes) in enumerate(SHAPES):
        tensors = {
            f"layers.{i}.weight": torch.randn(nbytes // 2, device="cuda", dtype=torch.bfloat16).to(
                device
            )
            for i in range(count)
        }
        fingerprint = f"bytes:{number + (100 if device == 'cpu' else 0):064x}"
        component = Component(
            fingerprint=fingerprint,
            role=role,
            label=f"{role} {number}",
            tensors=describe_tensors(tensors),
        )
        made.append((component, tensors))
    return made


def attach_elsewhere(
    daemon: DaemonProcess, device: str, fingerprints: list[str]
) -> tuple[float, float, str, subprocess.Popen[str]]:
    """Seconds, checksum and allocator of a fresh process; it holds its leases until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", ATTACHER, str(daemon.runtime_dir), device, ",".join(fingerprints)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seconds, checksum, allocator = process.stdout.readline().split()
    return float(seconds), float(checksum), allocator, process


def hand_over_all(client: Client, device: str, parts: list) -> tuple[float, list]:
    """Seconds until the last component is committed, and the attachments."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    attachments = [
        client.hand_over(component, device, lambda writer, t=tensors: writer.copy_tensors(t))
        for component, tensors in parts
    ]
    return time.perf_counter() - began, attachments


def release_memory() -> None:
    """Give torch's cached device memory back to the driver."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


class Measurement(FiguresFile):
    """The steps, in one daemon's life and on an otherwise idle GPU; each adds its figures."""

    def __init__(self, daemon: DaemonProcess, client: Client, uuid: str, path: Path) -> None:
        super().__init__(path)
        self.daemon = daemon
        self.client = client
        self.uuid = uuid
        self.attachments: list[Attachment] = []
        self.fingerprints: list[str] = []
        self.checksum = 0.0
        self.nbytes = 0
        release_memory()
        self.before = self.used()

    def used(self) -> int:
        """Bytes in use on the GPU, by anybody."""
        found = used_bytes(self.uuid)
        assert found is not None, "NVML is needed to count device memory"
        return found

    def keeper(self) -> DeviceStatus:
        """The GPU's line of the status report."""
        (gpu,) = [d for d in self.client.status().devices if d.device == self.uuid]
        return gpu

    def release(self) -> None:
        """Let every attachment go and wait until the daemon knows."""
        for attachment in self.attachments:
            attachment.release()
        self.attachments = []
        self.daemon.wait_for_status(lambda s: not any(c.sessions for c in s.components))

    def hand_over(self) -> None:
        """From tensors on the GPU; the originals are freed afterwards, as a node would."""
        parts = make_components("cuda")
        tensors = [tensor for _, named in parts for tensor in named.values()]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.checksum = sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors)
        self.fingerprints = [component.fingerprint for component, _ in parts]
        seconds, self.attachments = hand_over_all(self.client, self.uuid, parts)
        self.add("bytes handed over", self.nbytes / GIB, "GiB")
        self.meet(HAND_OVER, seconds * 1e3)
        tensors.clear()
        parts.clear()
        release_memory()
        self.meet(COPIES, (self.used() - self.before) / self.nbytes)

    def attach(self) -> None:
        """From other processes, before and after one of them is killed."""
        before = self.used()
        seconds, seen, allocator, other = attach_elsewhere(
            self.daemon, self.uuid, self.fingerprints
        )
        assert allocator == "cudaMallocAsync", allocator
        assert seen == self.checksum, (seen, self.checksum)
        self.meet(ATTACH, seconds * 1e3)
        self.add("device memory of that process", (self.used() - before) / 2**20, "MiB")
        other.kill()
        other.wait()
        seconds, seen, _, other = attach_elsewhere(self.daemon, self.uuid, self.fingerprints)
        assert seen == self.checksum
        self.add("attach after that process was killed", seconds * 1e3, "ms", ATTACH.limit)
        other.communicate("\n")

    def lose_keeper(self) -> None:
        """SIGKILL of the keeper, until there is one copy again."""
        began = time.perf_counter()

        def took(what: str) -> None:
            self.add(f"keeper killed: until {what}", time.perf_counter() - began, "s")

        os.kill(self.keeper().keeper_pid or 0, signal.SIGKILL)
        assert all(attachment.orphaned.wait(10) for attachment in self.attachments)
        took("clients know")
        self.daemon.wait_for_status(lambda s: all(d.state == "ready" for d in s.devices), 30)
        took("a new one is ready")
        renewed = [self.client.renew(attachment) for attachment in self.attachments]
        for attachment in self.attachments:
            attachment.release()
        del attachment
        self.attachments = renewed
        self.daemon.wait_for_status(lambda s: not any(d.orphaned for d in s.devices))
        took("one copy again")
        seen = sum(float(t.sum(dtype=torch.float64)) for a in renewed for t in a.tensors().values())
        assert seen == self.checksum, (seen, self.checksum)
        release_memory()
        copies = (self.used() - self.before) / self.nbytes
        self.add("device memory / bytes after it", copies, "×", COPIES.limit)

    def hand_over_from_host(self) -> None:
        """From ordinary (pageable) host memory."""
        parts = make_components("cpu")
        seconds, self.attachments = hand_over_all(self.client, self.uuid, parts)
        self.meet(HAND_OVER_FROM_HOST, seconds)
        self.add("rate from pageable host memory", self.nbytes / GIB / seconds, "GiB/s")
        for (_, tensors), attachment in zip(parts, self.attachments, strict=True):
            for name, view in attachment.tensors().items():
                assert torch.equal(view, tensors[name].to("cuda")), name
                del view


def measure(directory: Path, path: Path) -> int:
    """All steps; 0 when every limit was kept."""
    uuid = CudaDriver.load().device_uuid(0)
    torch.zeros(1, device="cuda")
    with running_daemon(directory, device="cuda") as daemon, daemon.client("owner") as client:
        measurement = Measurement(daemon, client, uuid, path)
        measurement.add("keeper's CUDA context", measurement.keeper().context / 2**20, "MiB")
        measurement.hand_over()
        measurement.attach()
        measurement.lose_keeper()
        measurement.release()
        measurement.hand_over_from_host()
        measurement.release()
        return measurement.status


def main() -> int:
    """Write ``gpu-sharing.json`` into the directory given, or into benchmarks/results."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        return measure(Path(directory), target / "gpu-sharing.json")


if __name__ == "__main__":
    sys.exit(main())
