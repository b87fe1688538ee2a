"""The device files that the NVIDIA driver needs in this process's world."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..regions.cuda_library import LIBRARY_VARIABLE
from .check import Finding, failed, passed, skipped
from .visit import Visit

_FIX = (
    "give this process the GPU: in a container `--gpus all` (NVIDIA container toolkit); on the "
    "host run `nvidia-modprobe -c 0 -u` and check the group of /dev/nvidia*"
)


def check_nodes(visit: Visit) -> Finding:
    """/dev/nvidiactl, /dev/nvidia-uvm and one node per GPU that the daemon serves."""
    if not visit.uses_gpu:
        return skipped("this daemon serves host memory only")
    if library := os.environ.get(LIBRARY_VARIABLE):
        return skipped(f"{LIBRARY_VARIABLE} names another driver library ({Path(library).name})")
    gpus = [device.device for device in visit.report.devices if device.kind != "memfd"]
    return look_at_nodes(gpus)


def look_at_nodes(
    gpus: list[str], dev: Path = Path("/dev"), proc: Path = Path("/proc/driver/nvidia")
) -> Finding:
    """The nodes of these GPUs (UUIDs) exist and may be read and written."""
    minors = _minors(proc)
    nodes = [dev / "nvidiactl", dev / "nvidia-uvm"]
    if all(gpu in minors for gpu in gpus):
        nodes += [dev / f"nvidia{minors[gpu]}" for gpu in gpus]
    else:
        # Containers often hide /proc/driver/nvidia: then nobody tells which node is which GPU.
        found = sorted(path for path in dev.glob("nvidia*") if path.name[6:].isdigit())
        if len(found) < len(gpus):
            return failed(
                f"{len(found)} GPU nodes in {dev} for {len(gpus)} GPUs of the daemon", _FIX
            )
        nodes += found
    for node in nodes:
        if not node.exists():
            return failed(f"{node} does not exist", _FIX)
        if not os.access(node, os.R_OK | os.W_OK):
            return failed(f"uid {os.geteuid()} may not read and write {node}", _FIX)
    return passed(", ".join(node.name for node in nodes))


def _minors(proc: Path) -> dict[str, int]:
    """GPU UUID → N of /dev/nvidiaN."""
    minors = {}
    for path in proc.glob("gpus/*/information"):
        text = path.read_text(errors="replace")
        uuid = re.search(r"GPU UUID:\s*(GPU-[0-9a-f-]{36})", text)
        minor = re.search(r"Device Minor:\s*(\d+)", text)
        if uuid and minor:
            minors[uuid[1]] = int(minor[1])
    return minors
