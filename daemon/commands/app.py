"""The command tree."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ... import __version__
from ...protocol.errors import SidecarError
from ..devices import NoDevice
from ..settings import SettingsError
from . import exit_status
from .config import config_command
from .generate import generate_command
from .ipc import ipc
from .load import load_command, unload_command
from .node import node
from .plan import plan_command
from .serve import serve_command
from .service import service
from .status import status_command

app = typer.Typer(
    name="xdit-sidecar",
    help="Keeps xDiT ranks and shared model components resident on the GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or what stands in [brackets] would be taken for a style
)
app.command("serve")(serve_command)
app.command("status")(status_command)
app.command("load")(load_command)
app.command("unload")(unload_command)
app.command("generate")(generate_command)
app.command("plan")(plan_command)
app.command("config")(config_command)
app.add_typer(ipc)
app.add_typer(service)
app.add_typer(node)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Keeps xDiT ranks and shared model components resident on the GPUs."""


def run(arguments: list[str]) -> int:
    """Run one command. Known errors become one line on standard error and an exit status."""
    try:
        app(arguments, prog_name="xdit-sidecar")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else exit_status.FAILED
    except (SettingsError, NoDevice) as error:
        return _tell(error, exit_status.USAGE)
    except SidecarError as error:
        return _tell(error, exit_status.of_error(error))
    return 0


def _tell(error: Exception, status: int) -> int:
    print(f"xdit-sidecar: {error}", file=sys.stderr)
    return status
