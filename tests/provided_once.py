"""Folders under `.cache/` that tests download once, and never commit."""

from __future__ import annotations

import fcntl
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path


def provide_once(target: Path, make: Callable[[Path], None]) -> Path | str:
    """``target``, which ``make`` makes where it is missing, or why it cannot be had."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # pytest-xdist's workers: one downloads, the others wait for it.
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            try:
                make(target)
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
                return str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
    return target
