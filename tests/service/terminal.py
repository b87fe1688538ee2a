"""Programs on a terminal, and what they show there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator


class Terminal:
    """What a program wrote to its terminal, without colours and cursor movements."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""

    def wait_for(self, text: str, seconds: float = 20.0) -> None:
        """Until it is shown; what was shown before it is forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self._text:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} was not shown:\n{self._text}"
            if select.select([self._descriptor], [], [], left)[0]:
                data = os.read(self._descriptor, 65536).decode(errors="replace")
                self._text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
        self._text = self._text.partition(text)[2]


@contextlib.contextmanager
def on_terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Terminal]]:
    """The command on a terminal of 200 by 50 characters."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    try:
        yield process, Terminal(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
