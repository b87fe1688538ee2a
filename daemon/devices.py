"""Which GPUs there are, asked in a child process: a broken driver cannot take the broker down."""

from __future__ import annotations

import json
import subprocess
import sys

from ..protocol.regions.cuda_driver import CudaDriver, CudaError, CudaUnavailable

_DISCOVERY_SECONDS = 60.0


class NoDevice(Exception):
    """The devices that were asked for are not there."""


def list_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees. Makes no context, but loads the driver.

    Raises CudaUnavailable or CudaError.
    """
    driver = CudaDriver.load()
    return [driver.device_uuid(ordinal) for ordinal in range(driver.device_count())]


def discover_gpus() -> tuple[list[str], str]:
    """(UUIDs, why there are none), asked in a child process."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "xdit_sidecar.daemon.devices"],
            capture_output=True,
            timeout=_DISCOVERY_SECONDS,
            check=False,
        )
        found = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        return [], f"the CUDA driver did not answer within {_DISCOVERY_SECONDS:.0f} s"
    except ValueError:
        return [], f"asking the CUDA driver ended with status {child.returncode}"
    return found["gpus"], found["reason"]


def choose_devices(wanted: str) -> tuple[str, ...]:
    """The devices to serve for "auto", "cpu", "cuda" or GPU UUIDs separated by commas.

    Host memory is always served too: ComfyUI may keep a text encoder there. Raises NoDevice.
    """
    if wanted == "cpu":
        return ("cpu",)
    gpus, reason = discover_gpus()
    if wanted == "auto":
        return (*gpus, "cpu")
    if wanted == "cuda":
        if not gpus:
            raise NoDevice(f"no CUDA device: {reason}; `--device cpu` serves host memory only")
        return (*gpus, "cpu")
    chosen = tuple(wanted.split(","))
    for uuid in chosen:
        if uuid not in gpus:
            seen = ", ".join(gpus) or f"none ({reason})"
            raise NoDevice(f"no device {uuid!r}: choose auto, cpu, cuda or from: {seen}")
    return (*chosen, "cpu")


def _main() -> None:
    try:
        found = {"gpus": list_gpus(), "reason": "the driver reports no device"}
    except (CudaUnavailable, CudaError) as error:
        found = {"gpus": [], "reason": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
