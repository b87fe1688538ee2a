"""The broker's end of one rank: its process, and the tasks that it is given.

A rank is a child process that opens a session like any client and then asks for tasks over the
bulk socket; the kernel's word on the session's pid tells the broker which rank it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from ...protocol import messages as m
from ...protocol.errors import RankLost
from ..ranks.messages import Assignment
from .events import Asker
from .fork_server import ForkServer
from .jobs import Frame
from .log import log
from .rank_process import RankProcess


class Result(NamedTuple):
    """What a rank answered to a task."""

    outcome: m.Outcome
    frames: Sequence[Frame]


class RankLink:
    """One life of one rank, in a process that is forked for it; the group starts the next one.

    ``deliver(asker, task, frames)`` sends a task; ``on_ready`` and ``on_exit`` tell the group.
    """

    def __init__(
        self,
        assignment: Assignment,
        server: ForkServer,
        *,
        deliver: Callable[[Asker, m.Task, Sequence[Frame]], None],
        on_ready: Callable[[], None],
        on_exit: Callable[[RankLink, int | None], None],
    ) -> None:
        """Raises OSError if the process cannot be started."""
        self.rank = assignment.rank
        self.device = assignment.device
        self.state: Literal["starting", "ready", "ended"] = "starting"
        self.error: str | None = None  # why it ended
        self.session: str | None = None  # set when it asks for its first task
        self.copied = 0  # bytes of components in host memory, on its device
        self.transformers: list[m.TransformerStatus] = []  # as it last said
        self.by_nccl: str | None = None  # the same
        self._deliver = deliver
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._next_task = 0
        self._idle: Asker | None = None  # its open request for a task
        self._queue: deque[tuple[m.Task, Sequence[Frame]]] = deque()
        self._running: dict[int, asyncio.Future[Result]] = {}
        self._process = RankProcess(server, assignment, self._exited)

    @property
    def pid(self) -> int | None:
        """Of its process, once there is one."""
        return self._process.pid

    def new_task(self) -> int:
        """A number for the next task."""
        self._next_task += 1
        return self._next_task

    def give(self, task: m.Task, frames: Sequence[Frame] = ()) -> asyncio.Future[Result]:
        """Queue a task. The future has its result, or raises RankLost if the rank dies first."""
        future: asyncio.Future[Result] = self._loop.create_future()
        if self.state == "ended":
            future.set_exception(RankLost(f"rank {self.rank} is not running: {self.error}"))
            future.exception()  # seen: nobody may be waiting
            return future
        self._running[task.task] = future
        self._queue.append((task, frames))
        self._hand_out()
        return future

    def asks(self, asker: Asker, request: m.NextTask, frames: Sequence[Frame]) -> None:
        """The rank brings the outcome of its last task and asks for another."""
        if self.state == "starting":
            self.state, self.session = "ready", asker.session
            self._on_ready()
        self.copied = request.copied
        for told in request.transformers:
            if told.state == "refused" and told not in self.transformers:
                log(
                    "not-compiled",
                    "warning",
                    rank=self.rank,
                    model=told.label,
                    lora=told.lora,
                    reason=told.reason,
                )
        self.transformers = request.transformers
        if request.by_nccl is not None and request.by_nccl != self.by_nccl:
            log("exchange-by-nccl", "warning", rank=self.rank, reason=request.by_nccl)
        self.by_nccl = request.by_nccl
        future = self._running.pop(request.task, None)
        if future is not None and not future.done() and request.outcome is not None:
            future.set_result(Result(request.outcome, frames))
        self._idle = asker
        self._hand_out()

    def kill(self, reason: str) -> None:
        """End the process; its tasks end at once with RankLost, ``on_exit`` follows."""
        self._drop_tasks(reason)
        self._process.kill()

    def discard(self) -> None:
        """End the process now; ``on_exit`` is not called."""
        self._process.discard()
        self._end("the daemon stops")

    def _hand_out(self) -> None:
        if self._idle is not None and self._queue:
            asker, self._idle = self._idle, None
            self._deliver(asker, *self._queue.popleft())

    def _exited(self, status: int | None) -> None:
        last = self._process.error
        how = "nobody can tell how" if status is None else status
        told = f"the process {self.pid} of rank {self.rank} ended ({how})"
        self._end(f"rank {self.rank}: {last}" if last else told)
        self._on_exit(self, status)

    def _end(self, reason: str) -> None:
        self.state, self.error = "ended", reason
        self._idle = self.session = None
        self._drop_tasks(reason)

    def _drop_tasks(self, reason: str) -> None:
        self._queue.clear()
        running, self._running = self._running, {}
        for future in running.values():
            if not future.done():
                future.set_exception(RankLost(reason))
                future.exception()  # seen: nobody may be waiting any more
