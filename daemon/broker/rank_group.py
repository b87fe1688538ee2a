"""The ranks that work together: started, watched, and restarted as one.

One rank dead, hung or out of step: all are killed and started anew, because the others wait for it
in a collective that never ends. Regions belong to keepers, so a new group maps what the old one
had mapped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ...protocol import messages as m
from ...protocol.errors import NO_RANKS, RankFault, RankLost, RanksUnavailable
from ..ranks.messages import Assignment
from .child_process import RestartPolicy
from .events import Asker
from .fork_server import ForkServer
from .jobs import Frame
from .log import log
from .rank_link import RankLink, Result

_START_SECONDS = 180.0  # imports, CUDA contexts and meeting, on a loaded machine
_GRACE_SECONDS = 1.0  # past the deadline, in which the ranks themselves give up
_END_SECONDS = 30.0  # after which a killed process that is still there is said to be stuck


class RankGroup:
    """The ranks on ``devices``, one each, in ``runtime_dir``.

    ``deadline``: seconds that one task may take, and one exchange among the ranks; ``reserve``:
    bytes of each device that they leave to others. ``on_lost`` is called with the error that what
    they were working on ends with, ``on_change`` when the group becomes ready or is given up.
    """

    def __init__(
        self,
        devices: Sequence[str],
        runtime_dir: Path,
        *,
        deadline: float,
        reserve: int,
        deliver: Callable[[Asker, m.Task, Sequence[Frame]], None],
        on_lost: Callable[[RankLost], None],
        on_change: Callable[[], None],
        compiles: m.Compile = "auto",
    ) -> None:
        self.devices = list(devices)
        self.state: Literal["starting", "ready", "degraded"] = "starting"
        self.error: str | None = None
        self.starts = 0
        self.links: list[RankLink] = []
        self.deadline = deadline
        self._runtime_dir = runtime_dir
        self.reserve = reserve
        self.compiles = compiles  # what ranks are told at their start
        self._deliver = deliver
        self._on_lost = on_lost
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._policy = RestartPolicy()
        self._timer: asyncio.TimerHandle | None = None  # of the start, or until the next one
        self._overdue: asyncio.TimerHandle | None = None  # of the task that is worked on
        self._ending = False  # killed, not all gone yet
        self._at_work = False  # has a task, or was killed with one
        self._server = ForkServer(self._arguments())

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """NCCL wants a GPU for each rank; everything else goes through gloo."""
        gpus = [device for device in self.devices if device != "cpu"]
        alone = len(gpus) == len(self.devices) == len(set(gpus))
        return "nccl" if alone and len(gpus) > 1 else "gloo"

    def start(self) -> None:
        """Start all ranks; the group is ready when each asks for a task."""
        self.starts += 1
        self.state, self._ending, self._at_work, self.links = "starting", False, False, []
        self._meeting_file.unlink(missing_ok=True)
        try:
            for rank, device in enumerate(self.devices):
                self.links.append(self._start_rank(rank, device))
        except OSError as error:  # no descriptors, processes or memory left
            self.error = f"a rank process could not be started: {error}"
            self._discard()
            self._start_again()
            return
        self._timer = self._loop.call_later(
            _START_SECONDS, self.restart, f"the ranks did not start within {_START_SECONDS:.0f} s"
        )
        log("ranks-started", ranks=len(self.links), backend=self.backend)

    def close(self) -> None:
        """End all processes and do not start them again."""
        self._cancel_timers()
        self._discard()
        self._server.close()
        self._meeting_file.unlink(missing_ok=True)

    def rank_of(self, pid: int) -> RankLink | None:
        """The rank with this pid."""
        return next((link for link in self.links if link.pid == pid), None)

    def check_life(self, life: int) -> None:
        """Raise RankLost unless ``life`` (:attr:`starts`, earlier) is still that of these ranks."""
        if self.starts != life:
            raise RankLost("the ranks were restarted meanwhile: try again")

    async def run(
        self,
        make_task: Callable[[RankLink], m.Task],
        frames: Sequence[Frame] = (),
        *,
        together: bool = False,
        patience: float | None = None,
    ) -> list[Result]:
        """Give every rank its task and wait for all. Only one such call at a time.

        ``together``: the ranks meet in collectives, so they must all end alike; ``patience``: the
        seconds that it may take, instead of the deadline. Raises RankLost if a rank dies, hangs or
        is out of step with the others.
        """
        if self.state != "ready":
            raise RankLost("the ranks are being restarted: try again")
        futures = [link.give(make_task(link), frames) for link in self.links]
        self._at_work = True
        seconds = self.deadline if patience is None else patience
        self._overdue = self._loop.call_later(
            seconds + _GRACE_SECONDS,
            lambda: self.restart(
                f"{self._silent(futures)} did not finish a task within {seconds:g} s"
            ),
        )
        try:
            await asyncio.wait(futures)
        finally:
            self._overdue.cancel()
        if any(future.exception() is not None for future in futures):
            raise RankLost(f"{self.error}; the ranks are being restarted: try again")
        results = [future.result() for future in futures]
        refusals = {r.outcome.code for r in results if isinstance(r.outcome, m.Failed)}
        apart = together and len({_kind(result) for result in results}) > 1
        if RankFault.code in refusals or apart:
            failed = [r.outcome.message for r in results if isinstance(r.outcome, m.Failed)]
            reason = failed[0] if failed else "the ranks answered one task differently"
            self.restart(reason)
            raise RankLost(f"{reason}; the ranks are being restarted: try again")
        self._at_work = False
        return results

    def worked(self) -> None:
        """A job came to its end: whatever failed before is not in a row with what may follow."""
        self._policy.worked()

    def restart(self, reason: str) -> None:
        """Kill all ranks; they are started again when the last one is gone."""
        if self._ending or self.state == "degraded":
            return
        self.error, self._ending = reason, True
        self.state = "starting"
        self._cancel_timers()
        log("ranks-lost", "error", error=reason)
        for link in self.links:
            if link.state != "ended":
                link.kill(reason)
        self._timer = self._loop.call_later(_END_SECONDS, self._stuck)
        self._on_lost(RankLost(f"{reason}; the ranks are being restarted: try again"))

    def explain(self) -> RanksUnavailable:
        """Why jobs are refused."""
        if not self.devices:
            return RanksUnavailable(NO_RANKS)
        if self._ending:
            return RanksUnavailable(f"{self.error}. The ranks start again when it has")
        return RanksUnavailable(
            f"the ranks failed three times in a row and are not started again: {self.error}. "
            "Mend that, then restart the daemon"
        )

    @property
    def _meeting_file(self) -> Path:
        return self._runtime_dir / "ranks.meeting"

    def _arguments(self) -> list[str]:
        """What every process is started with, whichever rank it becomes."""
        return [
            *("--world-size", str(len(self.devices)), "--backend", self.backend),
            *("--deadline", str(self.deadline), "--runtime-dir", str(self._runtime_dir)),
            *("--meeting-file", str(self._meeting_file)),
            *(["--gpu"] if any(device != "cpu" for device in self.devices) else []),
        ]

    def _start_rank(self, rank: int, device: str) -> RankLink:
        return RankLink(
            Assignment(rank, device, self.reserve, self.devices.count(device), self.compiles),
            self._server,
            deliver=self._deliver,
            on_ready=self._rank_ready,
            on_exit=self._rank_exited,
        )

    def _rank_ready(self) -> None:
        if self._ending or any(link.state != "ready" for link in self.links):
            return
        self._cancel_timers()
        self.state, self.error = "ready", None
        self._policy.started()  # a group that hangs before this is no group that lived
        pids = ",".join(str(link.pid) for link in self.links)
        log("ranks-ready", ranks=len(self.links), pids=pids)
        self._on_change()

    def _rank_exited(self, link: RankLink, status: int | None) -> None:
        log("rank-lost", "error", rank=link.rank, pid=link.pid, status=status)
        self.restart(link.error or f"rank {link.rank} ended")
        if all(other.state == "ended" for other in self.links):
            self._cancel_timers()
            self._start_again()

    def _stuck(self) -> None:
        """What was killed is not gone: a process that waits inside the kernel, for a driver."""
        pids = " and ".join(str(link.pid) for link in self.links if link.state != "ended")
        self.state = "degraded"
        self.error = (
            f"{self.error}; process {pids} was killed {_END_SECONDS:.0f} s ago and has not ended, "
            "as happens when a GPU or its driver hangs (`dmesg` tells)"
        )
        log("ranks-stuck", "error", error=self.error)
        self._on_change()

    def _start_again(self) -> None:
        delay = self._policy.failed(at_work=self._at_work)
        if delay is not None:
            self.state = "starting"
            self._timer = self._loop.call_later(delay, self.start)
            return
        self.state, self._ending = "degraded", False
        self._server.close()
        log("ranks-degraded", "error", error=self.error)
        self._on_change()

    def _silent(self, futures: Sequence[asyncio.Future[Result]]) -> str:
        waiting = [str(n) for n, future in enumerate(futures) if not future.done()]
        return f"rank {' and '.join(waiting)}"

    def _discard(self) -> None:
        for link in self.links:
            if link.state != "ended":
                with contextlib.suppress(OSError):
                    link.discard()

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._overdue):
            if timer is not None:
                timer.cancel()


def _kind(result: Result) -> str:
    outcome = result.outcome
    return outcome.code if isinstance(outcome, m.Failed) else type(outcome).__name__
