"""``xdit-sidecar node …``: the node pack in a ComfyUI."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ...protocol.errors import SidecarError
from ..comfyui import pack as node_pack
from ..comfyui.folder import (
    ComfyPython,
    NoPython,
    ask_python,
    find_custom_nodes,
    find_pythons,
    pip_command,
    requirement_names,
    run_pip,
)
from ..comfyui.pack import NAME, REQUIREMENTS, Change, Pack
from . import exit_status
from .console import make_console
from .options import Json

_TORCH = "torch"  # ComfyUI's Python has it
_SELF = "xdit-sidecar"
_SERVE = "xdit-sidecar serve"
_SOMEBODY = "PYTHON"  # in a command, where ComfyUI's Python is not known

node = typer.Typer(name="node", help="The node pack in a ComfyUI.", no_args_is_help=True)

ComfyUI = Annotated[
    Path,
    typer.Argument(
        metavar="COMFYUI_DIR", help="The folder with ComfyUI's main.py, or its --base-directory."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Also where the files were changed since.")]
Python = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The Python that starts this ComfyUI. [default: of a venv, .venv or python_embeded "
        "in its folder or beside it]",
        show_default=False,
    ),
]


class Surroundings(msgspec.Struct):
    """ComfyUI's Python, if it is known, and what installs the pack's requirements there."""

    python: ComfyPython | None
    missing: list[str] | None  # None: not known
    pip: list[str]

    @property
    def installed(self) -> str | None:
        """The version of this package in that Python, whose nodes ComfyUI uses instead."""
        return self.python.packages[_SELF] if self.python else None


class Installed(msgspec.Struct):
    """``node install --json``."""

    change: Change
    surroundings: Surroundings


class State(msgspec.Struct):
    """``node status --json``; ``own_version`` is that of this command, ``ok`` its exit status."""

    ok: bool
    pack: Pack
    own_version: str | None
    others: list[Path]
    surroundings: Surroundings


@node.callback()
def _group() -> None:
    """The node pack in a ComfyUI."""


@node.command("install")
def install_command(
    comfyui: ComfyUI,
    link: Annotated[
        bool, typer.Option("--link", help="A symbolic link to this clone, instead of a copy.")
    ] = False,
    force: Force = False,
    with_requirements: Annotated[
        bool,
        typer.Option(
            "--with-requirements",
            help="Also run the pip command that is shown; torch is not among the requirements.",
        ),
    ] = False,
    python: Python = None,
    json: Json = False,
) -> None:
    """Put the nodes into a ComfyUI, or bring them up to date. ComfyUI's torch is not touched.

    Exit status: 0 they are there, 1 they are not or their requirements could not be installed,
    2 wrong usage, such as a folder that is no ComfyUI.
    """
    with _told(json):
        custom_nodes = find_custom_nodes(comfyui)
        # Before anything is written: what was named must be right.
        known = None if python is None else _ask(python)
        change = node_pack.install(custom_nodes, link=link, force=force)
        around = _look_around(custom_nodes, change.path / REQUIREMENTS, known)
        if not json:
            _print(_describe(change))
            _print(*_describe_python(around))
        if with_requirements and around.missing != []:
            _install_requirements(around, named=known is not None)
            around.missing = []
            if not json:
                _print("the requirements are installed")
    if json:
        _print_json(Installed(change, around))
    elif change.action != "unchanged":
        _print("start ComfyUI again to have the nodes; the daemon is started by", "  " + _SERVE)


@node.command("uninstall")
def uninstall_command(comfyui: ComfyUI, force: Force = False, json: Json = False) -> None:
    """Take away what `node install` put into a ComfyUI.

    Exit status: 0 it is gone, 1 nothing was there or it stays, 2 wrong usage.
    """
    with _told(json):
        change = node_pack.uninstall(find_custom_nodes(comfyui), force=force)
    if json:
        _print_json({"change": change})
    else:
        _print(_describe(change))


@node.command("status")
def status_command(comfyui: ComfyUI, python: Python = None, json: Json = False) -> None:
    """Tell what of this node pack a ComfyUI has, and whether its requirements are there.

    Exit status: 0 it is complete and of this version, 1 it is not, 2 wrong usage.
    """
    with _told(json):
        custom_nodes = find_custom_nodes(comfyui)
        known = None if python is None else _ask(python)
        pack = node_pack.look(custom_nodes / NAME)
        source = node_pack.source()
        around = _look_around(custom_nodes, source / REQUIREMENTS, known)
        if (pack.path / REQUIREMENTS).is_file():
            around.pip[-1] = str(pack.path / REQUIREMENTS)
        state = State(
            ok=False,
            pack=pack,
            own_version=node_pack.look_at_source().version,
            others=node_pack.others(custom_nodes),
            surroundings=around,
        )
        state.ok = (
            pack.kind in ("copy", "link", "clone")
            and pack.version == state.own_version
            and not (pack.changed or state.others or around.missing)
            and around.installed in (None, pack.version)
        )
    if json:
        _print_json(state)
    else:
        _print(*_describe_state(state), *_describe_python(around), *_describe_mixture(state))
    raise typer.Exit(exit_status.HEALTHY if state.ok else exit_status.FAILED)


@contextmanager
def _told(json: bool) -> Iterator[None]:
    """With --json, a known error is an object on standard output, too."""
    try:
        yield
    except SidecarError as error:
        if not json:
            raise
        _print_json({"error": {"code": error.code, "message": str(error)}})
        raise typer.Exit(exit_status.of_error(error)) from None


def _ask(python: Path) -> ComfyPython:
    names = requirement_names(node_pack.source() / REQUIREMENTS)
    return ask_python(python.expanduser().absolute(), [*names, _TORCH, _SELF])


def _look_around(custom_nodes: Path, requirements: Path, known: ComfyPython | None) -> Surroundings:
    """With the first Python in or beside the ComfyUI that has torch, or else the first of all."""
    found = known
    for path in () if known else find_pythons(custom_nodes):
        try:
            python = _ask(path)
        except NoPython:
            continue
        found = found or python
        if python.packages[_TORCH]:
            found = python
            break
    if found is None:
        return Surroundings(None, None, pip_command(_SOMEBODY, requirements))
    missing = [name for name in found.missing if name not in (_TORCH, _SELF)]
    return Surroundings(found, missing, pip_command(found.path, requirements))


def _install_requirements(around: Surroundings, *, named: bool) -> None:
    """Raises NoPython where ComfyUI's Python is not known, or pip fails."""
    if around.python is None:
        raise NoPython(
            "the nodes are in place, their requirements are not: no Python was found in or beside "
            "this ComfyUI; name the one that starts it with --python"
        )
    if not named and not around.python.packages[_TORCH]:
        raise NoPython(
            f"the nodes are in place, their requirements are not: {around.python.path} has no "
            "torch, so ComfyUI runs in another environment; name its Python with --python"
        )
    run_pip(around.pip)


def _describe(change: Change) -> str:
    match change.action:
        case "installed":
            return f"installed xdit-sidecar {change.version} in {change.path}"
        case "updated" if change.before == change.version:
            return f"renewed xdit-sidecar {change.version} in {change.path}"
        case "updated":
            return f"replaced {change.before} by xdit-sidecar {change.version} in {change.path}"
        case "unchanged":
            return f"xdit-sidecar {change.version} is in {change.path} already"
        case "linked":
            return f"linked {change.path} to this clone of xdit-sidecar {change.version}"
    return f"removed {change.path} (xdit-sidecar {change.before})"


def _describe_state(state: State) -> list[str]:
    pack, own = state.pack, state.own_version
    match pack.kind:
        case "absent":
            lines = [f"{pack.path} does not exist: xdit-sidecar node install puts it there"]
        case "foreign":
            lines = [f"{pack.path} is not xdit-sidecar's"]
        case kind:
            what = f"a link to {pack.target}," if kind == "link" else f"a {kind} of"
            lines = [f"{pack.path}: {what} xdit-sidecar {pack.version}, protocol {pack.protocol}"]
            if pack.version != own:
                lines.append(f"this command is of {own}: xdit-sidecar node install replaces it")
    lines += [f"changed since it was installed: {name}" for name in pack.changed]
    lines += [f"{path} is this node pack, too: remove one of them" for path in state.others]
    return lines


def _describe_python(around: Surroundings) -> list[str]:
    python, command = around.python, shlex.join(around.pip)
    if python is None:
        return [
            "no Python was found in or beside this ComfyUI; with the one that starts it, run",
            f"  {command}",
        ]
    torch = python.packages[_TORCH]
    with_torch = f"torch {torch}" if torch else "no torch: is it the right one?"
    lines = [f"its Python: {python.path} ({python.version}, {with_torch})"]
    if installed := around.installed:
        lines.append(f"xdit-sidecar {installed} is installed there, and is used instead")
    if around.missing:
        return [*lines, f"{', '.join(around.missing)} must be installed there:", f"  {command}"]
    return [*lines, f"it has all of {REQUIREMENTS}"]


def _describe_mixture(state: State) -> list[str]:
    around, pack = state.surroundings, state.pack
    if around.python is None or pack.version is None or around.installed in (None, pack.version):
        return []
    return [
        f"that is another version than {pack.version} in {pack.path}, which ComfyUI takes the "
        "translations and example workflows from: to have one version of all, run",
        f"  {shlex.join([str(around.python.path), '-m', 'pip', 'uninstall', _SELF])}",
    ]


def _print(*lines: str) -> None:
    console = make_console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value, enc_hook=str))  # paths
