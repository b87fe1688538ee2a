"""A ComfyUI on this disk: where its custom nodes go, and which Python starts it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ...protocol.errors import SidecarError

CUSTOM_NODES = "custom_nodes"

_PROGRAM = ("main.py", "nodes.py", "comfy")  # beside custom_nodes/ in every ComfyUI
_BASE = ("models", "user")  # beside it in a folder for --base-directory, such as the desktop app's
_BELOW = "ComfyUI"  # what the portable package calls the program's folder
_ENVIRONMENTS = ("venv", ".venv", "python_embeded", "python_embedded")
_PYTHONS = ("bin/python", "Scripts/python.exe", "python.exe")
_SECONDS = 60.0  # for an interpreter to answer; a cold disk is slow

_ASK = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = sys.argv[1:]
print(json.dumps({"version": sys.version.split()[0], "packages": {n: version(n) for n in names}}))
"""


class NotComfyUI(SidecarError):
    """The folder that was named is no ComfyUI; the message says what it is."""

    code = "not-comfyui"


class NoPython(SidecarError):
    """The Python of a ComfyUI was not found, does not run, or its pip failed."""

    code = "no-python"


class _Answer(msgspec.Struct):
    version: str
    packages: dict[str, str | None]


class ComfyPython(msgspec.Struct):
    """An interpreter, and what it has of the packages that were asked for (None: not there)."""

    path: Path
    version: str
    packages: dict[str, str | None]

    @property
    def missing(self) -> list[str]:
        """Names of the packages that it lacks."""
        return [name for name, version in self.packages.items() if version is None]


def find_custom_nodes(directory: Path) -> Path:
    """``custom_nodes`` of the ComfyUI in ``directory``. Raises NotComfyUI."""
    place = directory.expanduser().absolute()
    if not place.exists():
        raise NotComfyUI(f"{place} does not exist: name the folder that has ComfyUI's main.py")
    if not place.is_dir():
        raise NotComfyUI(f"{place} is a file: name the folder that has ComfyUI's main.py")
    nodes = place / CUSTOM_NODES
    is_program = _has(place, _PROGRAM)
    if nodes.is_dir() and (is_program or _has(place, _BASE)):
        return nodes
    if is_program:
        raise NotComfyUI(
            f"{place} is a ComfyUI without the folder {CUSTOM_NODES}: start it once, or make that "
            "folder; with --base-directory, name that directory instead"
        )
    for other, where in ((place / _BELOW, "in"), *((p, "above") for p in place.parents)):
        if _has(other, (*_PROGRAM, CUSTOM_NODES)):
            raise NotComfyUI(f"{place} is no ComfyUI, the one {where} it is: name {other}")
    lacking = [name for name in ("main.py", CUSTOM_NODES) if not (place / name).exists()]
    raise NotComfyUI(
        f"{place} is no ComfyUI: it has no {' and no '.join(lacking or ['folder comfy'])}. Name "
        "the folder that has ComfyUI's main.py"
    )


def find_pythons(custom_nodes: Path) -> Iterator[Path]:
    """The Pythons of environments inside and beside that ComfyUI, the likeliest first.

    Only those that nobody else could have put there: they are going to be run.
    """
    place = custom_nodes.parent
    for folder in dict.fromkeys((place, place.parent, place.resolve().parent)):
        for environment in _ENVIRONMENTS:
            for name in _PYTHONS:
                python = folder / environment / name
                if python.is_file() and _is_trusted(python, folder / environment):
                    yield python


def _is_trusted(python: Path, environment: Path) -> bool:
    """Whether it is this account's or root's, and not open to everybody."""
    places = (environment, python.parent, python, python.resolve())
    found = [place.stat() for place in places]
    return all(s.st_uid in (0, os.geteuid()) and not s.st_mode & stat.S_IWOTH for s in found)


def ask_python(python: Path, packages: Sequence[str]) -> ComfyPython:
    """What an interpreter says of itself. Raises NoPython."""
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _ASK, *packages],
            capture_output=True,
            check=True,
            timeout=_SECONDS,
        )
        found = msgspec.json.decode(done.stdout, type=_Answer)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise NoPython(
            f"{python} does not answer as a Python ({error}): name ComfyUI's with --python"
        ) from None
    return ComfyPython(python, found.version, found.packages)


def requirement_names(requirements: Path) -> list[str]:
    """The packages that a requirements.txt names."""
    names = (re.match(r"[\w.-]+", line) for line in requirements.read_text().splitlines())
    return [name.group() for name in names if name]


def pip_command(python: Path | str, requirements: Path) -> list[str]:
    """Installs the requirements: with the environment's own pip, or uv where it has none."""
    if isinstance(python, Path) and not _has_pip(python) and (uv := shutil.which("uv")):
        return [uv, "pip", "install", "--python", str(python), "-r", str(requirements)]
    return [str(python), "-m", "pip", "install", "-r", str(requirements)]


def run_pip(command: Sequence[str]) -> None:
    """Run it, its output on standard error. Raises NoPython with what to do."""
    try:
        # Standard output belongs to --json.
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=2)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoPython(
            f"installing the requirements failed ({error}); the nodes are in place, and this is "
            f"what they still need: {shlex.join(command)}"
        ) from None


def _has(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).exists() for name in names)


def _has_pip(python: Path) -> bool:
    def site_packages() -> Iterator[Path]:
        prefix = python.parent if python.name == "python.exe" else python.parent.parent
        yield from prefix.glob("lib/python3*/site-packages/pip")
        yield from prefix.glob("Lib/site-packages/pip")

    return any(site_packages())
