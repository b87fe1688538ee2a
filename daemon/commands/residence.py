"""Having a weights file resident where the ranks work: for ``load`` and ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ...protocol.client.attachment import Attachment
from ...protocol.client.client import Client
from ...protocol.component_file import ComponentFile, hand_over_file
from ...protocol.safetensors_file import SafetensorsFile
from ..models.parts import Part, find_parts

_LOAD_SECONDS = 600.0  # without a byte of progress


class Resident(NamedTuple):
    """A component that this process holds a lease on, on one device."""

    role: str
    attachment: Attachment
    bytes_read: int  # of weights; 0 if somebody had it resident already


def work_devices(client: Client) -> list[str]:
    """Where components are wanted: the ranks' devices; without ranks, all GPUs or the CPU."""
    status = client.status()
    ranked = dict.fromkeys(rank.device for rank in status.ranks)
    if ranked:
        return list(ranked)
    served = [device.device for device in status.devices]
    return [device for device in served if device != "cpu"] or served


def make_resident(
    client: Client,
    path: Path,
    devices: list[str],
    *,
    role: str | None = None,
    console: Console,
) -> Iterator[Resident]:
    """Hand over every part of a file (or the one of ``role``) on each device, one after another.

    Errors of :func:`find_parts` come before anything is handed over.
    """
    with SafetensorsFile.open(path) as file:
        parts = find_parts(file, role)
        for part in parts:
            for device in devices:
                yield _hand_over(client, file, part, device, console)


def _hand_over(
    client: Client, file: SafetensorsFile, part: Part, device: str, console: Console
) -> Resident:
    component = ComponentFile(file, role=part.role, prefix=part.prefix)
    with _progress(console, f"{part.role} {file.label} → {device}") as on_progress:
        attachment = hand_over_file(
            client, component, device, timeout=_LOAD_SECONDS, on_progress=on_progress
        )
    return Resident(part.role, attachment, component.bytes_read)


@contextlib.contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_progress
