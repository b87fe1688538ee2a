"""The broker's end of a rank: starts the process, hands it tasks, notices its death.

A rank is a child process that opens a session like any client and then waits for tasks on the
control socket; the kernel's word on the session's pid tells the broker which rank it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal

from ...protocol import messages as m
from ...protocol.errors import ProbeFailed, SidecarError
from .child_process import ChildProcess, RestartPolicy
from .events import Asker
from .log import log

Deliver = Callable[[Asker, m.ProbeTask], None]


class RankLink:
    """One rank, over and over; three failures in a row hold it ``failed`` with its last error."""

    def __init__(self, rank: int, device: str, *, arguments: list[str], deliver: Deliver) -> None:
        self.rank = rank
        self.device = device
        self.state: Literal["starting", "ready", "failed"] = "starting"
        self.error: str | None = None
        self.starts = 0
        self.session: str | None = None  # set when it asks for its first task
        self._arguments = arguments
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._child: ChildProcess | None = None
        self._policy = RestartPolicy()
        self._restart: asyncio.TimerHandle | None = None
        self._next_task = 0
        self._idle: Asker | None = None  # the rank's open AwaitTask
        self._queue: deque[m.ProbeTask] = deque()
        self._running: dict[int, asyncio.Future[bytes]] = {}

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the process; it is ready when it asks for a task."""
        self._restart = None
        self.starts += 1
        self.state = "starting"
        self._policy.started()
        try:
            self._child = ChildProcess(
                "xdit_sidecar.daemon.ranks",
                ["--rank", str(self.rank), "--device", self.device, *self._arguments],
                on_exit=self._exited,
            )
        except OSError as error:  # no descriptors, processes or memory left
            self.error = f"the rank process could not be started: {error}"
            log("rank-not-started", "error", rank=self.rank, error=self.error)
            self._start_again()
            return
        log("rank-started", rank=self.rank, device=self.device, pid=self._child.pid)

    def give(self, grant: m.RegionGrant, probe: m.Probe) -> asyncio.Future[bytes]:
        """Queue a probe. The future has what the rank read, or raises ProbeFailed."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self._child is None:
            future.set_exception(ProbeFailed(f"rank {self.rank} is not running: {self.error}"))
            return future
        self._next_task += 1
        self._running[self._next_task] = future
        self._queue.append(
            m.ProbeTask(
                task=self._next_task,
                grant=grant,
                offset=probe.offset,
                length=probe.length,
                write=probe.write,
            )
        )
        self._hand_out()
        return future

    def awaits(self, asker: Asker) -> None:
        """The rank asks for work."""
        if self.state == "starting":
            self.state, self.error = "ready", None
            log("rank-ready", rank=self.rank, device=self.device, pid=self.pid)
        self._idle = asker
        self._hand_out()

    def finished(self, result: m.FinishTask) -> None:
        """The rank is done with a task; a task that nobody waits for any more is ignored."""
        future = self._running.pop(result.task, None)
        if future is None or future.done():
            return
        if result.error is None:
            future.set_result(result.data)
        else:
            future.set_exception(ProbeFailed(f"rank {self.rank}: {result.error}"))

    def close(self) -> None:
        """End the process and do not start it again."""
        if self._restart is not None:
            self._restart.cancel()
        if self._child is not None:
            self._child.discard()
            self._child = None
        self._fail_all(ProbeFailed("the daemon stops"))

    def _hand_out(self) -> None:
        if self._idle is not None and self._queue:
            asker, self._idle = self._idle, None
            self._deliver(asker, self._queue.popleft())

    def _exited(self, status: int) -> None:
        pid, self._child, self._idle = self.pid, None, None
        self.session = None
        self.error = f"the rank process {pid} ended with status {status}"
        log("rank-lost", "error", rank=self.rank, device=self.device, pid=pid, status=status)
        self._fail_all(ProbeFailed(f"rank {self.rank} died"))
        self._start_again()

    def _start_again(self) -> None:
        delay = self._policy.failed()
        if delay is None:
            self.state = "failed"
            log("rank-failed", "error", rank=self.rank, device=self.device, error=self.error)
        else:
            self.state = "starting"
            self._restart = self._loop.call_later(delay, self.start)

    def _fail_all(self, error: SidecarError) -> None:
        self._queue.clear()
        running, self._running = self._running, {}
        for future in running.values():
            if not future.done():
                future.set_exception(error)
