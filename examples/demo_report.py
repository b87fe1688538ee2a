"""What the demo prints: coloured on a terminal, plain text elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
_PLAIN_WIDTH = 120  # of files and pipes, in characters


class Report:
    """Tells the story and remembers what went wrong."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH
        self.failures: list[str] = []

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def check(self, good: bool, text: str) -> None:
        """One line with its verdict."""
        verdict, style = ("ok", "green") if good else ("WRONG", "bold red")
        self.console.print(f"[{style}]{verdict:>5}[/]", end="  ")
        self.console.print(text, markup=False)
        if not good:
            self.failures.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; from the second column on aligned to the right."""
        frame = box.ROUNDED if self.console.is_terminal else box.ASCII
        table = Table(title=title, title_justify="left", title_style="bold", box=frame)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table, crop=False)


def mib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / MIB:.1f} MiB"


def ms(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds * 1000:.1f} ms"
