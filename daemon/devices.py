"""Which GPUs there are, asked in a child process: a broken driver cannot take the broker down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ..protocol.regions.cuda_driver import CudaDriver, CudaError, CudaUnavailable
from .broker.log import log

_DISCOVERY_SECONDS = 60.0
_KERNEL_MODULE = Path("/proc/driver/nvidia")


class NoDevice(Exception):
    """The devices that were asked for are not there."""


class Found(NamedTuple):
    """The driver's answer: UUIDs, else why there are none, and whether a driver is installed."""

    gpus: list[str]
    reason: str
    driver: bool = True


class Chosen(NamedTuple):
    """The devices to serve, host memory last.

    ``no_gpu``: why none is a GPU, where somebody may expect one because a driver is installed.
    """

    devices: tuple[str, ...]
    no_gpu: str = ""


def list_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees. Makes no context, but loads the driver.

    Raises CudaUnavailable or CudaError.
    """
    driver = CudaDriver.load()
    return [driver.device_uuid(ordinal) for ordinal in range(driver.device_count())]


def discover_gpus() -> tuple[list[str], str]:
    """(UUIDs, why there are none), asked in a child process."""
    return _ask_driver()[:2]


def choose_devices(wanted: str) -> Chosen:
    """What to serve for "auto", "cpu", "cuda" or GPU UUIDs separated by commas.

    Host memory is always served too: ComfyUI may keep a text encoder there. Raises NoDevice.
    """
    if wanted == "cpu":
        return Chosen(("cpu",))
    gpus, reason, driver = _ask_driver()
    if wanted == "auto":
        if not gpus:
            log("no-gpu", "warning" if driver else "info", reason=reason)
        return Chosen((*gpus, "cpu"), "" if gpus or not driver else reason)
    if wanted == "cuda":
        if not gpus:
            raise NoDevice(f"no CUDA device: {reason}; `--device cpu` serves host memory only")
        return Chosen((*gpus, "cpu"))
    chosen = tuple(wanted.split(","))
    for uuid in chosen:
        if uuid not in gpus:
            seen = ", ".join(gpus) or f"none ({reason})"
            raise NoDevice(f"no device {uuid!r}: choose auto, cpu, cuda or from: {seen}")
    return Chosen((*chosen, "cpu"))


def _ask_driver() -> Found:
    try:
        child = subprocess.run(
            [sys.executable, "-m", "xdit_sidecar.daemon.devices"],
            capture_output=True,
            timeout=_DISCOVERY_SECONDS,
            check=False,
        )
        return Found(**json.loads(child.stdout))
    except subprocess.TimeoutExpired:
        return Found([], f"the CUDA driver did not answer within {_DISCOVERY_SECONDS:.0f} s")
    except ValueError:
        return Found([], f"asking the CUDA driver ended with status {child.returncode}")


def _main() -> None:
    try:
        found = Found(list_gpus(), "the driver reports no device")
    except (CudaUnavailable, CudaError) as error:
        # Without its library there is no driver, unless the kernel has one loaded.
        no_library = isinstance(error.__cause__, OSError)
        found = Found([], str(error), driver=not no_library or _KERNEL_MODULE.exists())
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    _main()
