"""``xdit-sidecar status --watch``: the status as a table that lives."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ...protocol.client.client import Client
from ...protocol.client.deadline import Deadline
from ...protocol.errors import SidecarError
from .console import make_console


def watch_status(runtime_dir: Path | None, every: float, *, json: bool) -> None:
    """Until Ctrl-C: the screen anew on a terminal, one status below the other elsewhere.

    ``json``: one line for each. A daemon that is gone is waited for; other errors show, too.
    """
    console = make_console()
    # Ctrl-C is how one leaves.
    with contextlib.suppress(KeyboardInterrupt), Client(runtime_dir, name="status") as client:
        if json:
            while True:
                typer.echo(_as_json(client))
                time.sleep(every)
        elif not console.is_terminal:
            while True:
                console.print(_view(client, console), highlight=False)
                console.print()
                time.sleep(every)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_view(client, console), refresh=True)
                time.sleep(every)


def _view(client: Client, console: Console) -> Group:
    from .status import describe_status

    try:
        status = client.status()
        own = client.session(Deadline(1.0)).welcome.session
    except SidecarError as error:
        return Group(Text(str(error), style="red"), Text("looking again … (Ctrl-C ends this)"))
    parts = describe_status(status, own, bars=console.is_terminal)
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _as_json(client: Client) -> bytes:
    try:
        return msgspec.json.encode(client.status())
    except SidecarError as error:
        return msgspec.json.encode({"error": {"code": error.code, "message": str(error)}})
