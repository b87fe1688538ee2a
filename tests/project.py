"""The project's own files, for tests that look at the whole tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "xdit_sidecar"
GENERATED = {".git", ".venv", ".cache", ".hypothesis", "__pycache__", "build", "dist"}
NOT_PACKAGE = {"tests", "tools", "examples", "benchmarks", "docs", "systemd", ".ci"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files() -> list[Path]:
    """Relative paths of the files that git tracks or would track; of all files without git."""
    listed = (
        subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"],
            capture_output=True,
            check=False,
        )
        if shutil.which("git") and (ROOT / ".git").exists()
        else None
    )
    if listed is not None and listed.returncode == 0:
        names = {Path(name) for name in listed.stdout.decode().split("\0") if name}
        return sorted(name for name in names if (ROOT / name).is_file())
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [n for n in below if n not in GENERATED and not n.endswith(".egg-info")]
        found += [Path(folder, name).relative_to(ROOT) for name in names]
    return sorted(found)


def package_files() -> list[Path]:
    """The Python files that are part of the import package, relative to the root."""
    return [path for path in files() if path.suffix == ".py" and path.parts[0] not in NOT_PACKAGE]


def data_files() -> list[Path]:
    """What is part of the package without being Python, relative to the root."""
    loose = {Path(n) for n in ("py.typed", "LICENSE", "pyproject.toml", "requirements.txt")}
    names = ("locales", "example_workflows", "comfy_client_node/web", "systemd")
    folders = [Path(name) for name in names]
    return [path for path in files() if path in loose or any(f in path.parents for f in folders)]


def packages_on_disk() -> set[str]:
    """Import names of the folders of the package that have an __init__.py."""
    folders = (path.parent for path in package_files() if path.name == "__init__.py")
    return {".".join((PACKAGE, *folder.parts)) for folder in folders}


def modules_below(*packages: str) -> list[str]:
    """Import names of all modules of these packages; `__main__` files are programs, not modules."""
    names = []
    for path in package_files():
        parts = path.with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        name = ".".join((PACKAGE, *parts))
        if parts[-1:] != ("__main__",) and any(
            name == package or name.startswith(package + ".") for package in packages
        ):
            names.append(name)
    return sorted(names)


def copy_to(target: Path) -> Path:
    """A copy of the tree, as a fresh clone would have it."""
    for path in files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path)
    return target
