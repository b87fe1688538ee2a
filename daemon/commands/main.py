"""Entry point: assembles the commands and turns known errors into one line and an exit status."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line. 0 healthy or done, 1 not, 2 wrong usage, 3 no daemon."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print(
            "the commands need the daemon's packages: pip install '.[daemon]' in a clone of the "
            "repository (with the pip of an environment of its own, not ComfyUI's)",
            file=sys.stderr,
        )
        return 2
    from .app import run

    return run(sys.argv[1:])
