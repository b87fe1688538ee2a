"""``xdit-sidecar serve``."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from ...protocol.endpoints import resolve_runtime_dir
from ..devices import choose_devices
from ..serve import serve
from ..settings import Settings
from .options import RuntimeDir

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

# torch's allocator settings that ComfyUI makes for itself and its children: with cudaMallocAsync
# ranks could not use CUDA IPC the other way round.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def parse_bytes(text: str) -> int:
    """Bytes of "512M", "6GiB" or a plain number. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write for example 512M or 6GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def serve_command(
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda|UUID[,UUID]", help="Devices to serve; host memory is always one."
        ),
    ] = "auto",
    ranks: Annotated[int, typer.Option(min=0, max=64, help="Rank processes to keep.")] = 0,
    deadline: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="How long one step of the ranks may take before they are restarted.",
        ),
    ] = 60.0,
    budget: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Most that components may take per device. [default: all but the reserve]",
            show_default=False,
        ),
    ] = None,
    reserve: Annotated[
        int,
        typer.Option(parser=parse_bytes, metavar="SIZE", help="Stays free on each device."),
    ] = "512M",  # type: ignore[assignment]  # parsed like a given value
    idle: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Evict a component that nobody has used for so long; 0 keeps it until room is "
            "needed.",
        ),
    ] = 0.0,
    trust_uid: Annotated[
        list[int] | None,
        typer.Option(
            metavar="UID", min=0, help="Another account that may use and share components."
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    for name in _ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)
    serve(
        Settings(
            endpoints=resolve_runtime_dir(runtime_dir),
            devices=choose_devices(device),
            ranks=ranks,
            deadline=deadline,
            budget=budget,
            reserve=reserve,
            idle_seconds=idle,
            trusted_uids=frozenset(trust_uid or ()),
        )
    )
