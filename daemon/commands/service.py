"""``xdit-sidecar service …``: the daemon as a service of systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...protocol.errors import SidecarError
from ..unit_files import UNIT, UnitFile, command_words, system_files, user_files

_BOOTED = Path("/run/systemd/system")  # exists where systemd is process 1
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_CUDA = 'device = "cuda" on a machine with GPUs, so that it waits for a driver that is not up yet'

service = typer.Typer(name="service", help="Run the daemon under systemd.", no_args_is_help=True)

System = Annotated[
    bool,
    typer.Option("--system", help="The service of the host. [default: of your account]"),
]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="With --system: below this directory, which needs no systemd (for images, packages).",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Also if files there were changed.")]


class ServiceError(SidecarError):
    """The service cannot be installed or removed as things are."""

    code = "service"


@service.callback()
def _group() -> None:
    """Run the daemon under systemd."""


@service.command("print")
def print_command(system: System = False) -> None:
    """Show the files that `install` would write."""
    for path, text in _files(system, None):
        typer.echo(f"# --- {path}\n{text}")


@service.command("install")
def install_command(system: System = False, root: Root = None, force: Force = False) -> None:
    """Write the unit, with this installation's command in it.

    Exit status: 0 it is there, 1 it cannot be, 2 wrong usage.
    """
    files = _files(system, root)
    if root is None:
        _check_systemd()
    if system:
        _check_root(root)
        _check_reachable()
    for path, text in files:
        if not force and path.exists() and path.read_text("utf-8") != text:
            raise ServiceError(
                f"{path} is there with other contents: look at it (`xdit-sidecar service print` "
                "shows the new one), then --force. Changes of your own last in a drop-in: "
                f"`{_systemctl(system)} edit xdit-sidecar`"
            )
    for path, text in files:
        _write(path, text)
        typer.echo(f"wrote {path}")
    typer.echo("next:")
    for line in _next_steps(system):
        typer.echo(f"  {line}")


@service.command("uninstall")
def uninstall_command(system: System = False, root: Root = None, force: Force = False) -> None:
    """Remove what `install` wrote. Configuration and cache stay.

    Exit status: 0 it is gone, 1 it is in use or was changed, 2 wrong usage.
    """
    if system:
        _check_root(root)
    files = [file for file in _files(system, root) if file.path.exists()]
    if not files:
        typer.echo("nothing is installed")
        return
    unit = _files(system, root)[-1].path
    wanted = [link for link in unit.parent.glob(f"*.wants/{UNIT}") if link.is_symlink()]
    if wanted:
        raise ServiceError(
            f"the service is enabled ({wanted[0]}): first "
            f"`{_systemctl(system)} disable --now xdit-sidecar`"
        )
    for path, text in files:
        if not force and path.read_text("utf-8") != text:
            raise ServiceError(f"{path} was changed, or is of another version: --force removes it")
    for path, _ in files:
        try:
            path.unlink()
        except OSError as error:
            raise ServiceError(f"cannot remove {path}: {error.strerror}") from None
        typer.echo(f"removed {path}")
    typer.echo(f"next:\n  {_systemctl(system)} daemon-reload")


def _files(system: bool, root: Path | None) -> list[UnitFile]:
    if root is not None and not system:
        raise typer.BadParameter("--root goes with --system")
    try:
        return system_files(root or Path("/")) if system else user_files()
    except ValueError as error:
        raise ServiceError(str(error)) from None


def _check_systemd() -> None:
    if not _BOOTED.is_dir() or shutil.which("systemctl") is None:
        raise ServiceError(
            "this machine does not run systemd: start `xdit-sidecar serve` with what it has "
            "instead (it stays in the foreground and ends on SIGTERM); `xdit-sidecar service "
            "print` shows the unit"
        )


def _check_root(root: Path | None) -> None:
    if root is None and os.geteuid() != 0:
        raise ServiceError(
            "the service of the host is root's to change: `sudo` the same command with its full "
            f"path ({command_words()[0]}), or leave out --system for a service of your account"
        )


def _check_reachable() -> None:
    """The system unit hides home directories, also that in which the daemon may lie."""
    # A virtual environment elsewhere may still use an interpreter of somebody's home.
    for place in (command_words()[0], sys.base_prefix, __file__):
        for home in _HOMES:
            if Path(place).is_relative_to(home):
                raise ServiceError(
                    f"{place} lies in {home}, which the system service cannot see: install "
                    "xdit-sidecar with an interpreter and an environment outside of it, for "
                    "example `/usr/bin/python3 -m venv /opt/xdit-sidecar`"
                )


def _write(path: Path, text: str) -> None:
    """Replace a file at once, or not at all."""
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, "utf-8")
        new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise ServiceError(f"cannot write {path}: {error.strerror}") from None


def _systemctl(system: bool) -> str:
    return "systemctl" if system else "systemctl --user"


def _next_steps(system: bool) -> list[str]:
    if system:
        return [
            "systemd-sysusers && systemd-tmpfiles --create",
            "xdit-sidecar config --example > /etc/xdit-sidecar/config.toml",
            f"edit it: trust-uid, who may use it; {_CUDA}",
            "systemctl daemon-reload && systemctl enable --now xdit-sidecar",
        ]
    return [
        "mkdir -p ~/.config/xdit-sidecar",
        "xdit-sidecar config --example > ~/.config/xdit-sidecar/config.toml",
        f"edit it: {_CUDA}",
        "systemctl --user daemon-reload && systemctl --user enable --now xdit-sidecar",
        "loginctl enable-linger   # so that it also runs while you are not logged in",
    ]
