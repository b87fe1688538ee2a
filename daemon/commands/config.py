"""``xdit-sidecar config``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import typer

from ...protocol.health.units import human_bytes
from ..config import RELOADABLE, SIZES, Loaded, load_config, misspelt_variables
from ..unit_files import read_template
from .console import make_console, make_table
from .options import ConfigFile, Json


def config_command(
    config: ConfigFile = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print an example file with every key instead.")
    ] = False,
    json: Json = False,
) -> None:
    """The settings that `serve` would use here, and where each came from.

    Flags of `serve` come on top. Exit status: 0 they are valid, 2 one is not.
    """
    if example:
        typer.echo(read_template("config.example.toml"), nl=False)
        return
    loaded = load_config(file=config)
    for text in misspelt_variables():
        print(f"xdit-sidecar: warning: {text}", file=sys.stderr)
    if json:
        typer.echo(msgspec.json.encode(_as_json(loaded)))
        return
    table = make_table(f"Configuration file: {loaded.file or 'none'}", "key", "value", "from", "")
    for key, value in loaded.values().items():
        reload = "" if key in RELOADABLE else "needs a restart"
        table.add_row(key, _show(key, value), loaded.sources[key], reload)
    make_console().print(table, highlight=False)


def _as_json(loaded: Loaded) -> dict[str, Any]:
    settings = {
        key: {"value": value, "source": loaded.sources[key], "reloadable": key in RELOADABLE}
        for key, value in loaded.values().items()
    }
    return {"file": loaded.file, "settings": settings}


def _show(key: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if key in SIZES and isinstance(value, int):
        return human_bytes(value)
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
