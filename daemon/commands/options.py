"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...protocol.endpoints import RUNTIME_DIR_VARIABLE
from ..config import parse_size

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        envvar=RUNTIME_DIR_VARIABLE,
        metavar="DIR",
        # A daemon that trusts other accounts lets them pass through its directory, not list it.
        readable=False,
        help="Where the daemon's sockets lie. [default: wherever one answers: "
        "$XDG_RUNTIME_DIR/xdit-sidecar, then /run/xdit-sidecar]",
        show_default=False,
    ),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The configuration file. [default: $XDIT_SIDECAR_CONFIG, else "
        "$XDG_CONFIG_HOME/xdit-sidecar/config.toml, else /etc/xdit-sidecar/config.toml]",
        show_default=False,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def parse_bytes(text: str) -> int:
    """Bytes of "512M", "6GiB" or a plain number. Raises typer.BadParameter."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
