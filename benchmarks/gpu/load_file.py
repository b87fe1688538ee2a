"""A safetensors file of FLUX.1-dev's size (23.8 GB), from the page cache into a GPU region.

Measures ``hand_over_file`` through pinned memory with several numbers of reader threads, the same
through pageable memory, and an attach by another process. The bytes of some tensors are compared
with the file's after every load. Writes JSON after each step; no step begins that could not end
within the stage's time.

Usage: ``python benchmarks/gpu/load_file.py [OUTPUT [SHARE]]``; SHARE (0…1) of the blocks for a try.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from figures import Figure  # noqa: E402
from flux_files import DEV, shapes_of  # noqa: E402
from machine import describe_run  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file  # noqa: E402
from xdit_sidecar.protocol.regions import staging  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402
from xdit_sidecar.protocol.regions.memfd import available_host_memory  # noqa: E402
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile  # noqa: E402

BLOCK_BYTES = 64 << 20
SAMPLE_BYTES = 4096
STALLED_SECONDS = 60
STAGE_SECONDS = 225  # of the whole program
READERS = (2, 4, 8)
SLOWEST_SECONDS = 6.0  # what a load may take through pinned memory, at full size
SLOWEST_ATTACH_MS = 50.0

ATTACHER = """
import sys, time
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver
CudaDriver.load().memory_info(0)
with Client(sys.argv[1], name="attacher") as client:
    client.ping()
    began = time.perf_counter()
    attachment = client.attach(sys.argv[2], sys.argv[3])
    print(time.perf_counter() - began, flush=True)
    attachment.release()
"""


def write_file(path: Path, share: float) -> int:
    """A file of the model's names and shapes in bf16; the bytes of its weights.

    Its bytes are one random block again and again, on the disk and in the page cache.
    """
    flux = dataclasses.replace(
        DEV, double=max(1, int(DEV.double * share)), single=max(1, int(DEV.single * share))
    )
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes_of(flux).items():
        nbytes = 2 * prod(shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    check_room(path, end)
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, end, BLOCK_BYTES):
            file.write(memoryview(block)[: end - done])
    return end


def check_room(path: Path, nbytes: int) -> None:
    """Disk for the file, memory for it to stay in the page cache."""
    disk, (memory, _) = shutil.disk_usage(path.parent).free, available_host_memory()
    if disk < nbytes * 1.05 or memory < nbytes * 1.2:
        sys.exit(
            f"{nbytes / 1e9:.1f} GB are needed in {path.parent} and in host memory; "
            f"{disk / 1e9:.1f} and {memory / 1e9:.1f} GB are free"
        )


def warm_up(path: Path) -> None:
    """Read the file once, so that all of it is in the page cache."""
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


class Measurement:
    """The steps, in one daemon's life; each adds its figures and writes them."""

    def __init__(
        self, daemon: DaemonProcess, client: Client, uuid: str, path: Path, target: Path
    ) -> None:
        self.daemon = daemon
        self.client = client
        self.uuid = uuid
        self.path = path
        self.target = target
        self.began = time.monotonic()
        self.facts = describe_run()
        self.figures: list[Figure] = []

    def add(self, name: str, value: float, unit: str, threshold: float | None = None) -> None:
        """Record, print and write a figure."""
        self.figures.append(Figure(name, value, unit, threshold))
        print(self.figures[-1], flush=True)
        result = {**self.facts, "figures": [figure.as_dict() for figure in self.figures]}
        self.target.write_text(json.dumps(result, indent=2) + "\n")

    def has_time(self, seconds: float) -> bool:
        """Whether a step of so many seconds still fits."""
        return time.monotonic() - self.began + seconds < STAGE_SECONDS

    def load(self, what: str, *, threshold: float | None = None, attach: bool = False) -> float:
        """Hand the file over, compare, and evict it again; seconds."""
        reports = 0

        def count(_done: int, _total: int) -> None:
            nonlocal reports
            reports += 1

        with SafetensorsFile.open(self.path) as opened:
            file = ComponentFile(opened, role="transformer")
            began = time.perf_counter()
            attachment = hand_over_file(
                self.client, file, self.uuid, timeout=STALLED_SECONDS, on_progress=count
            )
            seconds = time.perf_counter() - began
            self.add(f"{what}: seconds", seconds, "s", threshold)
            self.add(f"{what}: rate", file.bytes_read / seconds / 1e9, "GB/s")
            self.add(f"{what}: progress calls", reports, "")
            for source, spec in zip(opened.tensors, file.component.tensors, strict=True):
                length = min(SAMPLE_BYTES, spec.nbytes)
                for at in (0, spec.nbytes - length):
                    found = attachment.mapping.read(spec.offset + at, length)
                    wanted = os.pread(opened.descriptor, length, source.position + at)
                    assert found == wanted, f"{spec.name} at byte {at}"
        if attach:
            self.attach(file.component.fingerprint)
        attachment.release()
        self.daemon.wait_for_status(lambda s: not any(c.sessions for c in s.components))
        self.client.evict(file.component.fingerprint, self.uuid)
        return seconds

    def attach(self, fingerprint: str) -> None:
        """By another process that has a CUDA context."""
        command = [sys.executable, "-c", ATTACHER, str(self.daemon.runtime_dir), fingerprint]
        answer = subprocess.run(
            [*command, self.uuid], capture_output=True, text=True, check=True, timeout=60
        )
        self.add("attach in another process", float(answer.stdout) * 1e3, "ms", SLOWEST_ATTACH_MS)


def measure(directory: Path, target: Path, share: float) -> list[Figure]:
    """All steps."""
    uuid = CudaDriver.load().device_uuid(0)
    CudaDriver.load().memory_info(0)
    path = directory / "flux1-dev.safetensors"
    began = time.perf_counter()
    nbytes = write_file(path, share)
    warm_up(path)
    wrote = time.perf_counter() - began
    with running_daemon(directory, device="cuda") as daemon, daemon.client("loader") as client:
        measurement = Measurement(daemon, client, uuid, path, target)
        measurement.began -= wrote
        measurement.add("bytes of weights", nbytes / 1e9, "GB")
        measurement.add("writing and reading them once", wrote, "s")
        usual = staging.READERS
        # Twice: the first also pins for the first time.
        measurement.load("warm, first", attach=True)
        threshold = SLOWEST_SECONDS * share
        seconds = measurement.load(f"warm, {usual} readers", threshold=threshold)
        for readers in READERS:
            if readers != usual and measurement.has_time(3 * seconds + 5):
                staging.READERS = readers
                measurement.load(f"warm, {readers} readers")
        staging.READERS = usual
        if measurement.has_time(nbytes / 0.5e9):
            usual_bytes, staging.WORTHWHILE_BYTES = staging.WORTHWHILE_BYTES, 1 << 60
            measurement.load("warm, pageable")
            staging.WORTHWHILE_BYTES = usual_bytes
        return measurement.figures


def main() -> int:
    """Write ``load_file.json`` into the directory given, or into benchmarks/results/gpu."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results" / "gpu"
    share = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        figures = measure(Path(directory), target / "load_file.json", share)
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
