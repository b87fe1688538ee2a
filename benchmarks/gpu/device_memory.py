"""Memory of a GPU, in all and by process, as the driver counts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_memory(names: Mapping[int, str], index: int = 0) -> dict[str, Any]:
    """Bytes ``used`` and by name of process; nothing where there is no GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001  no such package, no driver
        return {}
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        found: dict[str, Any] = {"used": int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)}
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError as error:
            found["processes"] = f"not told: {error}"
        else:
            found["processes"] = {
                names.get(each.pid, f"process {each.pid}"): each.usedGpuMemory for each in processes
            }
        return found
    finally:
        pynvml.nvmlShutdown()
