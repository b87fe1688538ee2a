"""The files that come with the package for systemd, filled in for this installation."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

TEMPLATES = Path(__file__).resolve().parent.parent / "systemd"
UNIT = "xdit-sidecar.service"
_COMMAND = "@COMMAND@"


class UnitFile(NamedTuple):
    """A file of the service: where it goes and what is in it."""

    path: Path
    text: str


def read_template(name: str) -> str:
    """A file of the package's ``systemd`` folder, as it is."""
    return (TEMPLATES / name).read_text("utf-8")


def user_files() -> list[UnitFile]:
    """What the service of one account consists of."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(base, "systemd", "user", UNIT)
    return [UnitFile(path, _fill(read_template(f"user/{UNIT}")))]


def system_files(root: Path = Path("/")) -> list[UnitFile]:
    """What the host's service consists of, below ``root``; the unit last."""
    return [
        UnitFile(
            root / "etc/sysusers.d/xdit-sidecar.conf", read_template("sysusers.d/xdit-sidecar.conf")
        ),
        UnitFile(
            root / "etc/tmpfiles.d/xdit-sidecar.conf", read_template("tmpfiles.d/xdit-sidecar.conf")
        ),
        UnitFile(root / "etc/systemd/system" / UNIT, _fill(read_template(UNIT))),
    ]


def command_words() -> list[str]:
    """How this installation is started: its script, or else its interpreter."""
    script = Path(sys.executable).with_name("xdit-sidecar")
    if script.is_file() and os.access(script, os.X_OK):
        return [str(script)]
    return [sys.executable, "-m", "xdit_sidecar.daemon"]


def quote(word: str) -> str:
    """A word of ExecStart=. Raises ValueError for what a unit file cannot hold."""
    if re.search(r"[\x00-\x1f\x7f]", word):
        raise ValueError(f"{word!r} has control characters, which a unit file cannot name")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./+@:,=%$-]+", escaped) else f'"{escaped}"'


def _fill(template: str) -> str:
    return template.replace(_COMMAND, " ".join(map(quote, command_words())))
