"""A rank process: it is told which rank it is, meets the others, and then does tasks.

A rank is a client of the broker like any other, so that its leases end with it. It waits
here and never inside a collective.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ...protocol import messages as m
from ...protocol.client.client import Client
from ...protocol.client.deadline import Deadline
from ...protocol.client.session import ClientSession
from ...protocol.errors import BadMessage, SidecarError
from ..child import name_process
from .channel import Channel

if TYPE_CHECKING:
    from .worker import Worker

_FOREVER = 10 * 365 * 86400.0


class RankArguments(NamedTuple):
    """What is the same for all ranks of a group; ``deadline`` in seconds."""

    world_size: int
    backend: str
    meeting_file: Path
    deadline: float
    runtime_dir: str


class RankClient(Client):
    """A client that is given work."""

    def serve(self, worker: Worker) -> NoReturn:
        """Do tasks until the daemon is gone; then SidecarError."""
        session = self.session(Deadline(10.0))
        request, frames = m.NextTask(), list[memoryview]()
        while True:
            task, inputs = self._next(session, request, frames)
            outcome, frames = worker.perform(
                task, inputs, lambda number: session.take_descriptor(number, Deadline(10.0))
            )
            request = m.NextTask(
                task=task.task,
                outcome=outcome,
                copied=worker.copied_bytes,
                transformers=worker.transformers,
                by_nccl=worker.by_nccl,
            )

    def _next(
        self, session: ClientSession, request: m.NextTask, frames: Sequence[memoryview]
    ) -> tuple[m.Task, list[memoryview]]:
        task, inputs = self.exchanges.exchange(session, request, Deadline(_FOREVER), frames)
        if not isinstance(task, m.Task):
            raise BadMessage(f"the daemon gave a {type(task).__name__} for a task")
        return task, inputs


def run_rank(arguments: RankArguments, channel: Channel) -> int:
    """Be a rank until the daemon is gone: the exit status. The engine must be loaded."""
    try:
        from .worker import Worker

        if (assignment := channel.receive_assignment()) is None:
            return 0
        name_process(f"xdit-rank-{assignment.rank}")
        worker = Worker.meet(
            rank=assignment.rank,
            world_size=arguments.world_size,
            device=assignment.device,
            backend=arguments.backend,
            meeting_file=arguments.meeting_file,
            deadline=arguments.deadline,
            reserve=assignment.reserve,
            neighbours=assignment.neighbours,
            compiles=assignment.compiles,
        )
    except SidecarError as error:
        channel.refuse(error)
        print(f"xdit-sidecar-rank: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        channel.refuse(error)
        raise
    client = RankClient(arguments.runtime_dir, name=f"rank{assignment.rank}")
    try:
        client.serve(worker)
    except SidecarError:
        return 1
    finally:
        client.close()
