"""Reading and writing probed bytes as a rank does: through a tensor that views the region."""

from __future__ import annotations

import torch

from ...protocol.manifest import TensorSpec
from ...protocol.messages import ProbeTask
from ...protocol.regions.base import MappingBytes, RegionMapping, check_range
from ...protocol.regions.table import process_regions
from ...protocol.regions.views import view_tensors


def perform_probe(task: ProbeTask, descriptor: int | None) -> bytes:
    """The bytes at the task's place, or none after writing some. Takes over ``descriptor``."""
    mapping = process_regions.acquire(task.grant, descriptor, writable=task.write is not None)
    try:
        return _perform(task, mapping)
    finally:
        process_regions.release(task.grant, writable=task.write is not None)


def _perform(task: ProbeTask, mapping: RegionMapping) -> bytes:
    length = task.length if task.write is None else len(task.write)
    check_range(task.offset, length, mapping.nbytes)
    spec = TensorSpec("probe", "U8", [length], task.offset)
    view = view_tensors(MappingBytes(mapping), [spec])["probe"]
    if task.write is None:
        return bytes(view.cpu().tolist())
    view.copy_(torch.frombuffer(bytearray(task.write), dtype=torch.uint8))
    mapping.synchronize()
    return b""
