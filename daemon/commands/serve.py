"""``xdit-sidecar serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ...protocol.errors import DeviceUnavailable
from ..config import Loaded, load_config
from ..devices import NoDevice
from ..serve import serve
from .options import ConfigFile

# torch's allocator settings that ComfyUI makes for itself and its children: with cudaMallocAsync
# ranks could not use CUDA IPC the other way round.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def _flag(metavar: str, text: str) -> typer.models.OptionInfo:
    """A setting: its text is read in :mod:`..config`, as that of every other source."""
    option: typer.models.OptionInfo = typer.Option(metavar=metavar, help=text, show_default=False)
    return option


def serve_command(
    device: Annotated[
        str | None,
        _flag(
            "auto|cpu|cuda|UUID[,UUID]",
            "Devices to serve; host memory is always one. [default: auto]",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        _flag(
            "auto|NUMBER",
            "Rank processes to keep; auto: one for each GPU, or one without a GPU. 0: components "
            "are shared and nothing is computed. [default: auto]",
        ),
    ] = None,
    compiles: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="auto|on|off",
            help="Whether ranks compile transformers while they are idle; auto: on a GPU. "
            "[default: auto]",
            show_default=False,
        ),
    ] = None,
    deadline: Annotated[
        str | None,
        _flag(
            "SECONDS",
            "How long one step of the ranks may take before they are restarted. [default: 60]",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        _flag("SIZE", "Most that components may take per device. [default: all but the reserve]"),
    ] = None,
    reserve: Annotated[
        str | None, _flag("SIZE", "Stays free on each device. [default: 512M]")
    ] = None,
    idle: Annotated[
        str | None,
        _flag(
            "SECONDS",
            "Evict a component that nobody has used for so long; 0 keeps it until room is "
            "needed. [default: 0]",
        ),
    ] = None,
    trust_uid: Annotated[
        list[str] | None,
        _flag("UID", "Another account that may use and share components; may be repeated."),
    ] = None,
    runtime_dir: Annotated[
        str | None,
        _flag(
            "DIR",
            "Where the daemon's sockets lie. "
            "[default: $XDG_RUNTIME_DIR/xdit-sidecar, or /run/xdit-sidecar for root]",
        ),
    ] = None,
    log_level: Annotated[
        str | None, _flag("debug|info|warning|error", "What is logged. [default: info]")
    ] = None,
    metrics: Annotated[
        str | None,
        _flag(
            "unix:PATH|127.0.0.1:PORT",
            "Serve Prometheus metrics to this host. [default: not at all]",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C; SIGHUP reloads its settings."""
    for name in _ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)
    flags: dict[str, str | list[str] | None] = {
        "device": device,
        "ranks": ranks,
        "compile": compiles,
        "deadline": deadline,
        "budget": budget,
        "reserve": reserve,
        "idle": idle,
        "trust-uid": trust_uid or None,
        "runtime-dir": runtime_dir,
        "log-level": log_level,
        "metrics": metrics,
    }
    # A reload may come when the daemon's directory is no longer what this one is.
    file = Path(os.path.abspath(config)) if config is not None else None

    def load() -> Loaded:
        return load_config(flags, file=file)

    try:
        serve(load)
    except NoDevice as error:
        # No wrong usage: it may be there later, so a service is to try again.
        raise DeviceUnavailable(str(error)) from None
