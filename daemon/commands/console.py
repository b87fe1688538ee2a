"""Where commands print: colours and the terminal's width on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

_PLAIN_WIDTH = 200  # nothing is cut off in a file or pipe


def make_console() -> Console:
    """A console on standard output; what stands in [brackets] is text."""
    if sys.stdout is not None and sys.stdout.isatty():
        return Console(markup=False)
    # Said outright, because FORCE_COLOR in the environment would win otherwise.
    return Console(
        force_terminal=False, no_color=True, color_system=None, width=_PLAIN_WIDTH, markup=False
    )


def make_table(title: str, *columns: str) -> Table:
    """An empty table. Columns that begin with ">" are aligned to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", overflow="fold"
        )
    return table
