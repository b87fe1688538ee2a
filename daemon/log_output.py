"""Where the daemon's log goes: standard error, one line per event, as journald likes it best."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TextIO

_LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # as syslog counts


class LineFormatter(logging.Formatter):
    """``LEVEL event key=value …``; for the journal, the level as ``<number>``.

    A traceback becomes one more value, ``traceback="…\\n…"``: one event is one line.
    """

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info:
            line += f" traceback={json.dumps(self.formatException(record.exc_info))}"
        if self._journal:
            return f"<{_LEVELS.get(record.levelname.lower(), 6)}>{line}"
        return f"{record.levelname} {line}"


def is_journal(stream: TextIO) -> bool:
    """Whether a stream leads to journald, which says so in ``$JOURNAL_STREAM``."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except OSError:  # closed, or no file at all
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def set_up_log(level: str) -> None:
    """Log to standard error from ``level`` ("debug", "info", …) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(journal=is_journal(sys.stderr)))
    logging.basicConfig(handlers=[handler])
    set_level(level)


def set_level(level: str) -> None:
    """Log from this level on; that of other packages stays at info, or what they trace is ours."""
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("xdit_sidecar").setLevel(level.upper())
