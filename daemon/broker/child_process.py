"""A child process of the broker, reaped by the event loop the moment it ends."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

_FAILURES_IN_A_ROW = 3
_STABLE_SECONDS = 30.0


class ChildProcess:
    """``python -m module arguments…``; ``on_exit(status)`` is called once, after it is reaped."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        on_exit: Callable[[int], None],
        descriptors: Sequence[int] = (),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--parent", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
        self.pid = self._process.pid
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(self.pid)
            self._loop.add_reader(self._pidfd, self._ended)
        except OSError:
            self.discard()  # nobody would ever reap it
            raise

    def kill(self) -> None:
        """SIGKILL; ``on_exit`` follows."""
        self._process.kill()

    def wait(self, seconds: float) -> None:
        """Until it has ended by itself, but no longer than that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def discard(self) -> None:
        """Kill and reap now; ``on_exit`` is not called."""
        self._process.kill()
        self._forget()
        self._process.wait()

    def _ended(self) -> None:
        self._forget()
        self._on_exit(self._process.wait())

    def _forget(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


class RestartPolicy:
    """When to start a child again: at once, then after pauses, and not after the third failure.

    A child that did its work, or lived for 30 s without any, before it failed begins a new row.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._started = math.inf

    def started(self) -> None:
        """The child was started now, or is ready now if that takes it long."""
        self._started = time.monotonic()

    def worked(self) -> None:
        """The child did what it is for."""
        self._failures = 0

    def failed(self, *, at_work: bool = False) -> float | None:
        """The child failed now: seconds until the next start, or None to give up.

        ``at_work``: at what it is for. Then it does not matter how long it lived: a hang is noticed
        only after a deadline.
        """
        lived, self._started = time.monotonic() - self._started, math.inf
        begins = lived >= _STABLE_SECONDS and not at_work
        self._failures = 1 if begins else self._failures + 1
        if self._failures >= _FAILURES_IN_A_ROW:
            return None
        return 0.0 if self._failures == 1 else 1.0
