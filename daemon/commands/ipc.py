"""``xdit-sidecar ipc …``: does the path between clients and the daemon work?"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ...protocol.endpoints import RuntimeDirError
from ...protocol.health.check import Check, Finding, HealthReport
from ...protocol.health.runner import DEFAULT_SECONDS, run_checks, wait_until_ready
from . import exit_status
from .console import make_console
from .options import Json, RuntimeDir

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_LEAST_SECONDS = 5.0  # for the checks themselves, when waiting took everything

ipc = typer.Typer(name="ipc", help="The path between clients and the daemon.", no_args_is_help=True)


class WaitFor(StrEnum):
    """What ``--wait`` can wait for."""

    READY = "ready"


@ipc.callback()
def _group() -> None:
    """The path between clients and the daemon."""


@ipc.command("health-check")
def health_check_command(
    json: Json = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86400.0, metavar="SECONDS", help="For everything.")
    ] = DEFAULT_SECONDS,
    wait: Annotated[
        WaitFor | None,
        typer.Option(
            help="First wait until the daemon answers and no keeper or rank is starting, within "
            "the same time."
        ),
    ] = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Prove the path: a region on every device, written and read from both sides.

    Exit status: 0 healthy, 1 unhealthy, 2 wrong usage, 3 no daemon.
    """
    try:
        if wait is not None:
            left = wait_until_ready(runtime_dir, timeout=timeout)
            timeout = max(left, min(timeout, _LEAST_SECONDS))
        report = run_checks(runtime_dir, timeout=timeout)
        status = exit_status.HEALTHY if report.ok else exit_status.FAILED
        if report.daemon_absent:
            status = exit_status.NO_DAEMON
    except RuntimeDirError as error:
        finding = Finding("fail", str(error), "name it with --runtime-dir")
        report = HealthReport.of([Check.of("runtime directory", finding, 0.0)], [])
        status = exit_status.USAGE
    if json:
        typer.echo(report.to_json())
    else:
        print_report(make_console(), report)
    raise typer.Exit(status)


def print_report(console: Console, report: HealthReport) -> None:
    """One line per check, what to do below those that need it, and the verdict."""
    for check in report.checks:
        line = Text()
        line.append(f"{check.status:<4}  ", style=_STYLES[check.status])
        line.append(f"{check.name}: ", style="bold")
        line.append(check.detail)
        line.append(f"  ({check.ms:.1f} ms)", style="dim")
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(Text(f"      -> {check.fix}"), soft_wrap=True)
    verdict = "healthy" if report.ok else "not healthy"
    console.print(Text(verdict, style="green" if report.ok else "bold red"))
