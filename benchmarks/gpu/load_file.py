"""A safetensors file of FLUX.1-dev's size (23.8 GB), from the page cache or the disk into a region.

Measures ``hand_over_file`` through pinned memory with several numbers of reader threads, the same
through pageable memory, an attach by another process, the host memory of two ranks that compute
with it, and a load from the disk against reading the file alone. The bytes of some tensors are
compared with the file's after every load. Writes JSON after each step; no step begins that could
not end within the stage's time.

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
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "tests")]

import page_cache  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from daemon_process import DaemonProcess, running_daemon  # noqa: E402
from figures_file import FiguresFile  # noqa: E402
from flux_files import DEV, shapes_of  # noqa: E402
from targets import LOAD_COLD, LOAD_HOST_MEMORY, LOAD_WARM  # noqa: E402
from xdit_sidecar.protocol import messages as m  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.client.remote import RemoteRanks  # noqa: E402
from xdit_sidecar.protocol.component_file import ComponentFile, hand_over_file  # noqa: E402
from xdit_sidecar.protocol.regions import staging  # noqa: E402
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver  # noqa: E402
from xdit_sidecar.protocol.regions.memfd import available_host_memory  # noqa: E402
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile  # noqa: E402

BLOCK_BYTES = 64 << 20
SAMPLE_BYTES = 4096
STALLED_SECONDS = 60
STAGE_SECONDS = 480  # of the whole program
READERS = (2, 4, 8)
SLOWEST_ATTACH_MS = 50.0
RANKS = 2
RANKS_SECONDS = 90  # until both have computed, with their start
LEFT_CACHED = 0.02  # of a file that the kernel was told to forget

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


def read_once(path: Path, readers: int) -> float:
    """Seconds in which so many threads read the file into nothing."""
    size = path.stat().st_size
    share = -(-size // readers)

    def read(start: int) -> None:
        buffer, end = memoryview(bytearray(BLOCK_BYTES)), min(start + share, size)
        with path.open("rb", buffering=0) as file:
            for at in range(start, end, BLOCK_BYTES):
                os.preadv(file.fileno(), [buffer[: end - at]], at)

    began = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(0, size, share)))
    return time.perf_counter() - began


def private_bytes(pid: int) -> int:
    """Host memory that is the process's alone."""
    return int(psutil.Process(pid).memory_full_info().uss)


class Measurement(FiguresFile):
    """The steps, in one daemon's life; each adds its figures and writes them."""

    def __init__(
        self, daemon: DaemonProcess, client: Client, uuid: str, path: Path, target: Path
    ) -> None:
        super().__init__(target)
        self.daemon = daemon
        self.client = client
        self.uuid = uuid
        self.path = path
        self.began = time.monotonic()

    def has_time(self, seconds: float) -> bool:
        """Whether a step of so many seconds still fits."""
        return time.monotonic() - self.began + seconds < STAGE_SECONDS

    def load(self, what: str, *, attach: bool = False) -> float:
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
            if LOAD_WARM.figure == (name := f"{what}: seconds"):
                self.meet(LOAD_WARM, seconds)
            else:
                self.add(name, seconds, "s")
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

    def compute_with_ranks(self, directory: Path) -> None:
        """How the host memory of ranks grows by a forward with the weights, in a daemon of theirs.

        Gloo: both are on this GPU. The weights are random bytes, and so is what comes out.
        """
        place = directory / "ranks"
        place.mkdir()
        options = ("--ranks", str(RANKS), "--compile", "off", "--deadline", "120")
        with (
            running_daemon(place, *options, device="cuda") as daemon,
            daemon.client("loader") as client,
            SafetensorsFile.open(self.path) as opened,
        ):
            remote = RemoteRanks(client)
            remote.wait_until_ready()
            pids = [rank.pid for rank in client.status().ranks if rank.pid is not None]
            before = [private_bytes(pid) for pid in pids]
            file = ComponentFile(opened, role="transformer")
            held = hand_over_file(client, file, self.uuid, timeout=STALLED_SECONDS)
            components = {"transformer": file.component.fingerprint}
            job = m.Forward(components=components, tensors=[], compute="BF16")
            call = {
                "x": torch.randn(1, 16, 64, 64),
                "timestep": torch.full((1,), 0.7),
                "context": torch.randn(1, 512, DEV.context),
                "y": torch.randn(1, DEV.pooled),
                "guidance": torch.full((1,), 3.5),
            }
            remote.run(job, call)
            grown = [private_bytes(pid) - was for pid, was in zip(pids, before, strict=True)]
            self.meet(LOAD_HOST_MEMORY, max(grown) / held.nbytes)
            held.release()

    def load_cold(self) -> None:
        """From the disk, after as many threads have read the file alone."""
        page_cache.forget(self.path)
        left = page_cache.cached_bytes(self.path) / self.path.stat().st_size
        self.add("left in the page cache", left, "×", LEFT_CACHED)
        if left > LEFT_CACHED or not self.has_time(0):
            return
        alone = read_once(self.path, staging.READERS)
        self.add("reading the file alone, cold", alone, "s")
        if self.has_time(1.5 * alone + 5):
            page_cache.forget(self.path)
            self.meet(LOAD_COLD, self.load("cold") / alone)


def measure(directory: Path, target: Path, share: float) -> int:
    """All steps; 0 when every limit was kept."""
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
        seconds = measurement.load(f"warm, {usual} readers")
        for readers in READERS:
            if readers != usual and measurement.has_time(3 * seconds + 5):
                staging.READERS = readers
                measurement.load(f"warm, {readers} readers")
        staging.READERS = usual
        if measurement.has_time(nbytes / 0.5e9):
            usual_bytes, staging.WORTHWHILE_BYTES = staging.WORTHWHILE_BYTES, 1 << 60
            measurement.load("warm, pageable")
            staging.WORTHWHILE_BYTES = usual_bytes
        if measurement.has_time(RANKS_SECONDS):
            measurement.compute_with_ranks(directory)
        measurement.load_cold()
        return measurement.status


def main() -> int:
    """Write ``gpu-load-file.json`` into the directory given, or into benchmarks/results."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results"
    share = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    target.mkdir(parents=True, exist_ok=True)
    # $TMPDIR, because only what lies on a disk can be read from it.
    with tempfile.TemporaryDirectory() as directory:
        return measure(Path(directory), target / "gpu-load-file.json", share)


if __name__ == "__main__":
    sys.exit(main())
