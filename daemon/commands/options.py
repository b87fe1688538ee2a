"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...protocol.endpoints import RUNTIME_DIR_VARIABLE

RuntimeDir = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        envvar=RUNTIME_DIR_VARIABLE,
        metavar="DIR",
        # A daemon that trusts other accounts lets them pass through its directory, not list it.
        readable=False,
        help="Where the daemon's sockets lie. "
        "[default: $XDG_RUNTIME_DIR/xdit-sidecar, or /run/xdit-sidecar for root]",
        show_default=False,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
