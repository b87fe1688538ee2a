"""Where compiled code lies, to outlive the daemon. It is run, so nobody else may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...protocol.endpoints import why_not_private

_OTHERS_WRITE = 0o022


def code_cache() -> Path | None:
    """In systemd's cache directory for the service, or in the account's; None if it has none."""
    if given := os.environ.get("CACHE_DIRECTORY"):
        return Path(given.partition(":")[0]) / "torchinductor"
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # neither HOME nor an entry for the uid
            return None
    return Path(base) / "xdit-sidecar" / "torchinductor"


def prepare_code_cache() -> str | None:
    """Make what ``$TORCHINDUCTOR_CACHE_DIR`` names ours alone; why it cannot be used, or None."""
    if not (given := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        return (
            f"there is no place to keep code: uid {os.geteuid()} has no home directory; set "
            "XDG_CACHE_HOME"
        )
    directory, owner = Path(given), os.geteuid()
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := _who_could_replace(directory, owner):
            return f"code cannot be kept safely: {problem}"
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.stat()
        if found.st_uid == owner and not stat.S_IMODE(found.st_mode) & _OTHERS_WRITE:
            directory.chmod(0o700)
        if problem := why_not_private(directory, owner=owner, loosest=0o700):
            return f"code cannot be kept safely: {problem}"
    except OSError as error:
        return f"code cannot be kept: {error}"
    return None


def keep_headers() -> None:
    """Have torch's precompiled C++ headers lie with the code; to be called before it compiles.

    They are code as well, and torch 2.13 has them in a folder of /tmp that others may make first.
    """
    if not (given := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        return
    from torch._inductor import codecache

    headers = Path(given) / "precompiled_headers"
    vars(codecache).update(_HEADER_DIR=str(headers), _HEADER_LOCK_DIR=str(headers / "locks"))


def _who_could_replace(directory: Path, owner: int) -> str | None:
    """Who may write to the directory above could put another in the place of ours, or None."""
    found = directory.parent.stat()
    if found.st_uid not in (owner, 0):
        return f"{directory.parent} belongs to uid {found.st_uid}"
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        return f"others may write to {directory.parent}"
    return None
