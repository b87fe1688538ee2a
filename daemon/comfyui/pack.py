"""The node pack as a folder in custom_nodes: what belongs to it, putting it there, taking it away.

A copy has a record of its files beside them. What differs from the record was changed by the user
and is not overwritten unless that is asked for; what has no record is never removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from ...protocol.errors import SidecarError

NAME = "xdit_sidecar"
REQUIREMENTS = "requirements.txt"

#: What ComfyUI needs of this package; the daemon stays where it is.
_PARTS = (
    *("__init__.py", "LICENSE", "pyproject.toml", REQUIREMENTS),
    *("protocol", "comfy_client_node", "locales", "example_workflows"),
)
_RECORD = ".xdit-sidecar.json"
_INSTALLED_IN = ("site-packages", "dist-packages")
# ComfyUI imports every folder in custom_nodes but those with this ending.
_BESIDE = ".disabled"
_ABANDONED_SECONDS = 600.0  # no installation takes so long

Kind = Literal["absent", "copy", "link", "clone", "foreign"]


class PackRefused(SidecarError):
    """What is in custom_nodes was put there by somebody else, was changed, or cannot be written."""

    code = "pack-refused"


class _Record(msgspec.Struct):
    """Of a copy: which version it is, and each file's SHA-256."""

    version: str
    protocol: str
    files: dict[str, str]


class Pack(msgspec.Struct):
    """What lies at a place in custom_nodes. ``changed``: files that differ from what was put."""

    path: Path
    kind: Kind
    version: str | None = None
    protocol: str | None = None
    target: Path | None = None  # of a link
    changed: list[str] = []


class Change(msgspec.Struct):
    """What an installation or its removal did; ``before`` is the version that was there."""

    action: Literal["installed", "updated", "unchanged", "linked", "removed"]
    path: Path
    version: str | None
    before: str | None = None


def source() -> Path:
    """This package's own folder: a clone's root, or where pip put it."""
    return Path(__file__).resolve().parents[2]


def is_clone(root: Path) -> bool:
    """Whether that is somebody's working copy and not what pip put there."""
    return root.parent.name not in _INSTALLED_IN


def pack_files(root: Path) -> Iterator[str]:
    """The pack's files below ``root``, relative to it, with slashes."""
    for part in _PARTS:
        if (root / part).is_file():
            yield part
        for path in sorted((root / part).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix()


def look(path: Path) -> Pack:
    """What lies at ``path``."""
    if path.is_symlink():
        target = path.resolve()
        kind: Kind = "link" if _is_ours(target) else "foreign"
        return Pack(path, kind, *_read_versions(target), target=target)
    if not path.exists():
        return Pack(path, "absent")
    if not _is_ours(path):
        return Pack(path, "foreign")
    record = _read_record(path)
    if record is None:
        return Pack(path, "clone", *_read_versions(path))
    return Pack(path, "copy", record.version, record.protocol, changed=_changes(path, record))


def look_at_source() -> Pack:
    """The pack that :func:`install` would put there."""
    return Pack(source(), "clone", *_read_versions(source()))


def others(custom_nodes: Path) -> list[Path]:
    """Further copies of this pack that ComfyUI would import as well."""
    return sorted(
        path
        for path in custom_nodes.iterdir()
        if path.name != NAME and not path.name.endswith(_BESIDE) and _is_ours(path)
    )


def install(custom_nodes: Path, *, link: bool = False, force: bool = False) -> Change:
    """Put this package's pack into ``custom_nodes``, in the place of an older or newer one.

    The new folder is written beside and then takes the old one's place. Raises PackRefused.
    """
    root, path = source(), custom_nodes / NAME
    if link and not is_clone(root):
        raise PackRefused(
            f"--link needs a clone of the repository, and this xdit-sidecar is installed in {root}:"
            " leave --link out, and a copy is made"
        )
    version, protocol = _read_versions(root)
    try:
        if twins := others(custom_nodes):
            raise PackRefused(
                f"{twins[0]} is this node pack, too, and ComfyUI would import both: move that "
                "folder out of custom_nodes first (this command did not put it there)"
            )
        found = look(path)
        if _is_up_to_date(found, root, link):
            return Change("unchanged", path, version, found.version)
        if not _may_replace(found, force):
            raise PackRefused(_why_not(found, "replaced"))
        if link:
            _link(root, path)
            return Change("linked", path, version, found.version)
        _put(root, path, _Record(version or "?", protocol or "?", {}))
    except OSError as error:
        raise _not_writable(custom_nodes, error) from None
    action: Literal["installed", "updated"] = "installed" if found.version is None else "updated"
    return Change(action, path, version, found.version)


def uninstall(custom_nodes: Path, *, force: bool = False) -> Change:
    """Remove what :func:`install` put there. Raises PackRefused."""
    path = custom_nodes / NAME
    found = look(path)
    if found.kind == "absent":
        raise PackRefused(f"{path} does not exist: nothing is installed there")
    if found.kind not in ("link", "copy") or (found.changed and not force):
        raise PackRefused(_why_not(found, "removed"))
    try:
        _take_away(path)
    except OSError as error:
        raise _not_writable(custom_nodes, error) from None
    return Change("removed", path, None, found.version)


def _is_up_to_date(found: Pack, root: Path, link: bool) -> bool:
    if link:
        return found.kind == "link" and found.target == root
    if found.kind != "copy" or found.changed:
        return False
    record = _read_record(found.path)
    return record is not None and record.files == {
        name: _digest(root / name) for name in pack_files(root)
    }


def _may_replace(found: Pack, force: bool) -> bool:
    match found.kind:
        case "absent":
            return True
        case "copy":
            return force or not found.changed
        case "link":
            return force
    return False


def _link(root: Path, path: Path) -> None:
    _sweep(path.parent)
    new = _beside(path)
    new.symlink_to(root, target_is_directory=True)
    _take_the_place(new, path)


def _put(root: Path, path: Path, record: _Record) -> None:
    """Copy the pack beside ``path``, then let it take the place."""
    _sweep(path.parent)
    new = _beside(path)
    new.mkdir()
    try:
        for name in pack_files(root):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, new / name)
            record.files[name] = _digest(new / name)
        (new / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        _take_the_place(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _take_the_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``, where something may be, or leave everything as it was."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    old = _beside(path)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    _remove(old)


def _take_away(path: Path) -> None:
    """Remove a link or a copy; ComfyUI never sees a part of it."""
    old = _beside(path)
    path.rename(old)
    _remove(old)


def _remove(path: Path) -> None:
    """What ComfyUI does not load any more: as much of it as this account may remove.

    ComfyUI, if it is another account's, may have written files of its own there.
    """
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{NAME}.{secrets.token_hex(4)}{_BESIDE}")


def _sweep(custom_nodes: Path) -> None:
    """Remove what an installation that was killed has left."""
    for path in custom_nodes.glob(f"{NAME}.????????{_BESIDE}"):
        if not re.fullmatch(rf"{NAME}\.[0-9a-f]{{8}}{_BESIDE}", path.name):
            continue
        with contextlib.suppress(OSError):  # another installation was faster
            if time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS:
                _remove(path)


def _why_not(found: Pack, done: str) -> str:
    """Why that is not replaced or removed, and what to do."""
    match found.kind:
        case "copy":
            shown = ", ".join(found.changed[:5]) + (", …" if len(found.changed) > 5 else "")
            return (
                f"{found.path} was changed since it was installed ({shown}): save what you need of "
                f"it; with --force it is {done} all the same"
            )
        case "link":
            return (
                f"{found.path} is a link to {found.target}: with --force the link is {done} (what "
                "it points to stays)"
            )
        case "clone":
            return (
                f"{found.path} is a clone or copy of xdit-sidecar {found.version} that this "
                f"command did not make, so it is not {done}: update it with `git -C {found.path} "
                "pull`, or move it out of custom_nodes and try again"
            )
    return (
        f"{found.path} is not xdit-sidecar's, so it is not {done}: see what it is, and move it out "
        "of custom_nodes if it is not needed"
    )


def _not_writable(custom_nodes: Path, error: OSError) -> PackRefused:
    try:
        owner = custom_nodes.owner()
    except (KeyError, OSError):
        owner = "its owner"
    return PackRefused(
        f"cannot write in {custom_nodes} ({error.strerror or error}); nothing was changed there: "
        f"run this as {owner}, who owns it, or see to it that the disk is writable and has room"
    )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is this project's, by its own description."""
    try:
        described = (folder / "pyproject.toml").read_text(errors="replace")
    except OSError:
        return False
    name = re.search(r'^name = "(.*)"$', described, re.MULTILINE)
    return name is not None and name[1] == "xdit-sidecar" and (folder / "__init__.py").is_file()


def _read_versions(root: Path) -> tuple[str | None, str | None]:
    """(version, protocol) of a pack, without importing it."""
    version = _find(root / "__init__.py", r'^__version__ = "(.+)"$')
    protocol = _find(root / "protocol/version.py", r"^PROTOCOL_VERSION = \w+\((\d+, ?\d+)\)$")
    return version, protocol and re.sub(r", ?", ".", protocol)


def _find(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def _read_record(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode((path / _RECORD).read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _changes(path: Path, record: _Record) -> list[str]:
    """Files that are not as recorded: changed, missing, or added."""
    present = {
        Path(folder, name).relative_to(path).as_posix()
        for folder, below, names in os.walk(path)
        if Path(folder).name != "__pycache__"
        for name in names
    } - {_RECORD}
    differing = {
        name for name in present & record.files.keys() if _digest(path / name) != record.files[name]
    }
    return sorted(differing | (present ^ record.files.keys()))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
