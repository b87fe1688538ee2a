"""Which job the ranks work on next. Pure: no I/O, no clock.

A job takes one turn of the ranks or several (a picture: one for each step). Sessions are served in
turn, so that a picture of one client does not keep another's forward waiting; the jobs of one
session are done one after another, in the order in which they came.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, Union

from ...protocol import limits
from ...protocol import messages as m
from ...protocol.errors import Busy
from .events import Asker

if TYPE_CHECKING:
    import zmq

#: The raw bytes of a tensor, as they were received.
Frame: TypeAlias = Union[bytes, "zmq.Frame"]


@dataclass(eq=False, slots=True)
class JobRecord:
    """One job and how far it is."""

    number: int
    asker: Asker
    domain: str  # whose components it may use
    body: m.Job
    frames: Sequence[Frame] = field(repr=False)
    regions: list[dict[str, str]] = field(default_factory=list)  # of each rank, by fingerprint
    begun: bool = False  # the ranks hold state of it
    cancelled: bool = False  # while the ranks work on it
    retried: bool = False
    life: int = 0  # of the ranks, in which its turn began

    @property
    def nbytes(self) -> int:
        """Bytes of its raw frames."""
        return sum(map(len, self.frames))


class Jobs:
    """Jobs that wait, by session, and the one that is worked on."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[JobRecord]] = OrderedDict()  # next session first
        self.running: JobRecord | None = None

    def __len__(self) -> int:
        return sum(map(len, self._queues.values())) + (self.running is not None)

    @property
    def waiting_bytes(self) -> int:
        """Raw bytes that waiting jobs hold."""
        return sum(job.nbytes for queue in self._queues.values() for job in queue)

    def add(self, job: JobRecord) -> None:
        """Queue a job. Raises Busy when too many, or too large ones, wait."""
        if len(self) >= limits.JOBS:
            raise Busy(f"{limits.JOBS} jobs wait for the ranks already: try again")
        waiting = self.waiting_bytes
        if waiting and waiting + job.nbytes > limits.JOB_BYTES:
            raise Busy(
                f"jobs with {waiting} bytes of tensors wait for the ranks already, the limit is "
                f"{limits.JOB_BYTES}: try again"
            )
        self._queues.setdefault(job.asker.session, deque()).append(job)

    def take(self) -> JobRecord | None:
        """The job whose turn it is; it is :attr:`running` until its turn ends."""
        for session in self._queues:
            queue = self._queues.pop(session)
            self.running = queue.popleft()
            if queue:
                self._queues[session] = queue  # behind the others
            return self.running
        return None

    def end_turn(self, *, finished: bool) -> None:
        """The running job's turn is over; unless it is finished it waits for the next one."""
        job, self.running = self.running, None
        if job is None or finished or job.cancelled:
            return
        self._queues.setdefault(job.asker.session, deque()).appendleft(job)

    def cancel(self, asker: Asker) -> JobRecord | None:
        """Withdraw the job of a request; None if there is none. A running turn runs to its end."""
        return next(iter(self._withdraw(lambda job: job.asker == asker)), None)

    def cancel_session(self, session: str) -> list[JobRecord]:
        """Withdraw all jobs of a session."""
        return self._withdraw(lambda job: job.asker.session == session)

    def drain(self) -> list[JobRecord]:
        """Withdraw all jobs that wait."""
        waiting = [job for queue in self._queues.values() for job in queue]
        self._queues.clear()
        return waiting

    def drain_begun(self) -> list[JobRecord]:
        """Withdraw the waiting jobs of which the ranks held state."""
        begun = [job for queue in self._queues.values() for job in queue if job.begun]
        return self._withdraw(lambda job: job in begun)

    def _withdraw(self, matches: Matches) -> list[JobRecord]:
        found = []
        for session, queue in list(self._queues.items()):
            kept = deque(job for job in queue if not matches(job))
            found += [job for job in queue if matches(job)]
            if kept:
                self._queues[session] = kept
            else:
                del self._queues[session]
        if self.running is not None and matches(self.running):
            self.running.cancelled = True
            found.append(self.running)
        return found


class Matches(Protocol):
    """Whether a job is meant."""

    def __call__(self, job: JobRecord, /) -> bool: ...
