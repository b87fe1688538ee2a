"""Jobs of clients, done by the ranks one turn after another.

:meth:`JobService.submit` queues; one coroutine takes turns: it opens the regions that a job needs
in every rank, gives all of them the same turn, and passes on what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from ...protocol import limits
from ...protocol import messages as m
from ...protocol.errors import (
    Internal,
    MissingComponent,
    OutOfMemory,
    RankLost,
    SidecarError,
    error_from_code,
)
from ..models.sources import name_source
from . import events as e
from .copy import Copy
from .job_tensors import check_tensors
from .jobs import Frame, JobRecord, Jobs
from .kept_tensors import KeptTensors
from .log import log, logger
from .rank_group import RankGroup
from .rank_link import RankLink, Result
from .scratch import ScratchRegion, ScratchRegions
from .wake import Wake

_TRIM_AFTER_SECONDS = 2.0  # without work
_LOOK_SECONDS = 0.02
_COMPILE_AFTER_SECONDS = 0.5  # without work: more than between the steps of a client's sampler
_COMPILE_AMID_SECONDS = 60.0  # after which ranks that are never idle compile between two turns
_COMPILE_SECONDS = 100.0  # that one piece may take: less than what clients wait for an answer
_COMPILE_LOSSES = 2  # ranks lost while they compiled, after which they are started without

Frames = Sequence[Frame]


class JobHost(Protocol):
    """What the service needs of the broker."""

    def answer(self, asker: e.Asker, body: m.AnswerBody, frames: Frames = ()) -> None: ...

    def answer_step(self, asker: e.Asker, body: m.Step, frames: Frames) -> None: ...

    def find_resident(self, domain: str, fingerprint: str, device: str) -> Copy | None: ...

    async def export_to(self, session: str, copy: Copy) -> m.RegionGrant: ...

    def send_descriptor(self, session: str, descriptor: int) -> int: ...

    async def make_room(self, device: str, keep: frozenset[str]) -> None: ...

    def name_holders(self, device: str) -> str: ...


class JobService:
    """Runs from :meth:`start` to :meth:`close` on the event loop."""

    def __init__(self, host: JobHost, group: RankGroup) -> None:
        self.jobs = Jobs()
        self.kept = KeptTensors()
        self.scratch = ScratchRegions()
        self._host = host
        self._group = group
        self._open: dict[str, set[int]] = {}  # region → ranks that have it mapped, or are about to
        self._closing: dict[str, list[Callable[[], None]]] = {}
        self._dropped_jobs: list[int] = []
        self._dropped_sessions: list[str] = []
        self._dropped_scratches: list[tuple[str, int]] = []
        self._served: set[str] = set()  # sessions that had jobs, of which ranks may keep something
        self._numbers = itertools.count(1)
        self._wake = Wake()
        self._worked = False  # since memory was trimmed
        self._compile_at = math.inf  # when ranks are to compile though jobs wait
        self._compiling = False
        self._compile_losses = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take turns."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def close(self) -> None:
        """Take no further turn."""
        if self._task is not None:
            self._task.cancel()
        self.scratch.close()

    # --- what the broker tells

    def submit(self, asker: e.Asker, domain: str, body: m.Job, frames: Frames) -> None:
        """Queue a job. Raises BadMessage, RanksUnavailable and Busy."""
        scratch = self._scratch_of(asker.session, body)
        check_tensors(body.tensors, frames, None if scratch is None else scratch.nbytes)
        if self._group.state == "degraded" or not self._group.devices:
            raise self._group.explain()
        if missing := self.kept.missing(asker.session, body.tensors):
            self._host.answer(asker, m.Need(missing))
            return
        self.jobs.add(JobRecord(next(self._numbers), asker, domain, body, frames))
        self._served.add(asker.session)
        self._wake.set()

    def open_scratch(self, session: str, body: m.OpenScratch) -> int:
        """Make a scratch region: a descriptor of it. Raises Busy, OutOfMemory and BadMessage."""
        if body.instead_of is not None and self.scratch.end(session, body.instead_of):
            self._dropped_scratches.append((session, body.instead_of))
            self._wake.set()
        return self.scratch.open(session, body.number, body.nbytes)

    def cancel(self, asker: e.Asker) -> None:
        """The client gave up: nobody waits for this job any more."""
        if (job := self.jobs.cancel(asker)) is not None:
            self._drop([job])

    def session_ended(self, session: str) -> None:
        """Forget the jobs of a session and what is kept for it, here and in the ranks."""
        self._drop(self.jobs.cancel_session(session))
        self.kept.end_session(session)
        self.scratch.end_session(session)
        if session in self._served:
            self._served.remove(session)
            self._dropped_sessions.append(session)
            self._wake.set()

    @property
    def held_bytes(self) -> int:
        """Raw bytes that jobs make the broker hold."""
        running = self.jobs.running
        return self.jobs.waiting_bytes + (running.nbytes if running is not None else 0)

    def close_region(self, region: str, then: Callable[[], None]) -> bool:
        """Have the ranks unmap a region, then call ``then``; False if none has it mapped."""
        if region not in self._open:
            return False
        self._closing.setdefault(region, []).append(then)
        self._wake.set()
        return True

    def ranks_lost(self, error: RankLost) -> None:
        """The ranks are gone with everything that they held; others have not been started yet."""
        if self._compiling:
            self._compile_losses += 1
            if self._compile_losses >= _COMPILE_LOSSES:
                self._group.compiles = "off"
                log("compile-given-up", "warning", error=str(error))
        self.kept.clear()
        self.scratch.ranks_lost()
        for dropped in (self._dropped_jobs, self._dropped_sessions, self._dropped_scratches):
            dropped.clear()
        for job in self.jobs.drain_begun():
            if job is not self.jobs.running:  # that one's turn ends with the same error
                self._refuse(job, error)
        self._open.clear()
        closing, self._closing = self._closing, {}
        for then in itertools.chain.from_iterable(closing.values()):
            then()

    def ranks_changed(self) -> None:
        """The ranks are ready, or given up."""
        if self._group.state == "degraded":
            for job in self.jobs.drain():
                self._refuse(job, self._group.explain())
        self._wake.set()

    # --- turns

    async def _serve(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self._group.state == "ready" and await self._do_something():
                    pass
            except RankLost:
                pass  # ranks_lost has been told
            except Exception:  # noqa: BLE001  one bad job must not end the service
                logger.exception("job-service-broke")
                self._group.restart("the daemon failed while it gave the ranks a task")
            await self._wait()

    async def _wait(self) -> None:
        patience = None
        if self._has_to_compile:
            patience = _COMPILE_AFTER_SECONDS
        elif self._worked and self._group.state == "ready":
            patience = _TRIM_AFTER_SECONDS
        if not await self._wake.wait(patience):
            if self._has_to_compile:
                await self._compile()
            else:
                self._worked = False
                await self._trim()

    @property
    def _has_to_compile(self) -> bool:
        told = (transformer for link in self._group.links for transformer in link.transformers)
        waiting = any(transformer.state == "compiling" for transformer in told)
        return waiting and self._group.state == "ready"

    def _compile_is_overdue(self) -> bool:
        if not self._has_to_compile:
            self._compile_at = math.inf
            return False
        now = asyncio.get_running_loop().time()
        if self._compile_at == math.inf:
            self._compile_at = now + _COMPILE_AMID_SECONDS
        return now >= self._compile_at

    async def _compile(self) -> None:
        """Have the ranks compile one piece. Jobs that come meanwhile wait for it."""
        self._worked, self._compile_at = True, math.inf
        self._compiling = True
        try:
            with contextlib.suppress(RankLost):
                await self._group.run(
                    lambda link: m.CompileTask(task=link.new_task()), patience=_COMPILE_SECONDS
                )
        finally:
            self._compiling = False

    async def _trim(self) -> None:
        with contextlib.suppress(RankLost):
            await self._group.run(lambda link: m.TrimTask(task=link.new_task()), together=True)

    async def _do_something(self) -> bool:
        """One step of work, the most urgent first; False when there is none."""
        if self._closing:
            await self._close_regions()
        elif self._dropped_jobs or self._dropped_sessions or self._dropped_scratches:
            await self._drop_from_ranks()
        elif self._compile_is_overdue():
            await self._compile()
        elif (job := self.jobs.take()) is not None:
            await self._take_turn(job)
        else:
            return False
        return True

    async def _close_regions(self) -> None:
        closing, self._closing = self._closing, {}
        regions = list(closing)
        # Out of the book first: a job that begins meanwhile must not count on them.
        for region in regions:
            self._open.pop(region, None)
        with contextlib.suppress(RankLost):  # then they are unmapped all the same
            await self._group.run(lambda link: m.CloseTask(task=link.new_task(), regions=regions))
        for then in itertools.chain.from_iterable(closing.values()):
            then()

    async def _drop_from_ranks(self) -> None:
        jobs = self._dropped_jobs[: limits.JOBS]
        sessions = self._dropped_sessions[: limits.SESSIONS]
        scratches = self._dropped_scratches[: limits.SCRATCHES]
        del self._dropped_jobs[: limits.JOBS], self._dropped_sessions[: limits.SESSIONS]
        del self._dropped_scratches[: limits.SCRATCHES]
        await self._group.run(
            lambda link: m.DropTask(
                task=link.new_task(), jobs=jobs, sessions=sessions, scratches=scratches
            )
        )

    async def _take_turn(self, job: JobRecord) -> None:
        finished = True
        try:
            missing = self.kept.missing(job.asker.session, job.body.tensors)
            if missing and not job.begun:
                self._host.answer(job.asker, m.Need(missing))
                return
            self._worked, job.life = True, self._group.starts
            await self._open_components(job)
            await self._open_scratch(job)
            if job.cancelled:  # perhaps with its session, for which nothing may be kept any more
                self._drop([job])
                return
            result = await self._turn(job)
            if _out_of_memory(result) is not None and not job.retried and not job.cancelled:
                job.retried = True
                result = await self._turn_with_more_room(job)
            finished = self._pass_on(job, result)
        except SidecarError as error:
            self._refuse(job, error)
            self._drop([job])
        except Exception:
            self._refuse(job, Internal("the daemon failed at this job: see its log"))
            raise
        finally:
            self.jobs.end_turn(finished=finished)

    async def _open_components(self, job: JobRecord) -> None:
        """Have every rank map what the job computes with. Raises MissingComponent."""
        if job.begun:
            if any(r not in self._open for regions in job.regions for r in regions.values()):
                raise MissingComponent(
                    "a component of this job was evicted while it ran: keep a client that uses "
                    "it open, and hand it over again"
                )
            return
        # All of them first: with one missing, none is to be opened.
        found = [
            {
                fingerprint: self._find(job, link.device, role, fingerprint)
                for role, fingerprint in _components(job.body)
            }
            for link in self._group.links
        ]
        job.regions = [{key: copy.region for key, copy in copies.items()} for copies in found]
        for copies in zip(*(copies.values() for copies in found), strict=True):
            await self._open_component(copies, job.life)

    async def _open_component(self, copies: Sequence[Copy], life: int) -> None:
        """Have every rank map its copy of a component. One at a time: a table may be large."""
        lacking = {
            rank: copy
            for rank, copy in enumerate(copies)
            if rank not in self._open.get(copy.region, ())
        }
        if not lacking:
            return
        # In the book at once: what is evicted meanwhile has to be unmapped afterwards.
        for rank, copy in lacking.items():
            self._open.setdefault(copy.region, set()).add(rank)
        opening: dict[int, list[m.OpenedRegion]] = {}
        opened: set[int] = set()
        failed: SidecarError | None = None
        try:
            for rank, copy in lacking.items():
                try:
                    opening[rank] = [await self._export(self._group.links[rank], copy)]
                except SidecarError as error:
                    failed = error
            self._group.check_life(life)
            # Also if one failed: what the others have been sent must not stay unopened.
            results = await self._group.run(
                lambda link: m.OpenTask(task=link.new_task(), regions=opening.get(link.rank, []))
            )
            for rank in opening:
                outcome = results[rank].outcome
                if isinstance(outcome, m.Failed):
                    failed = MissingComponent(
                        f"rank {rank} cannot open what it is to compute with: {outcome.message}"
                    )
                else:
                    opened.add(rank)
            if failed is not None:
                raise failed
        finally:
            for rank in lacking.keys() - opened:
                self._open.get(lacking[rank].region, set()).discard(rank)

    async def _open_scratch(self, job: JobRecord) -> None:
        """Have every rank map the job's scratch region. Raises BadMessage and BadJob."""
        region = self._scratch_of(job.asker.session, job.body)
        if region is None or region.ranks.issuperset(range(len(self._group.links))):
            return
        self._group.check_life(job.life)
        grants = {
            link.rank: m.ScratchGrant(
                session=region.session,
                number=region.number,
                nbytes=region.nbytes,
                descriptor=self._host.send_descriptor(_session_of(link), region.duplicate()),
            )
            for link in self._group.links
            if link.rank not in region.ranks
        }
        region.ranks.update(grants)
        results = await self._group.run(
            lambda link: m.OpenTask(task=link.new_task(), scratch=grants.get(link.rank))
        )
        for rank in grants:
            if isinstance(outcome := results[rank].outcome, m.Failed):
                region.ranks.clear()  # told again, those that have it forget the old map
                raise error_from_code(outcome.code, outcome.message)

    def _scratch_of(self, session: str, body: m.Job) -> ScratchRegion | None:
        number = m.scratch_of(body)
        return None if number is None else self.scratch.find(session, number)

    def _find(self, job: JobRecord, device: str, role: str, fingerprint: str) -> Copy:
        for place in dict.fromkeys([device, "cpu"]):
            copy = self._host.find_resident(job.domain, fingerprint, place)
            if copy is not None:
                return copy
        raise MissingComponent(
            f"the {role} of this job is not resident on {device}: {name_source(role)}"
        )

    async def _export(self, link: RankLink, copy: Copy) -> m.OpenedRegion:
        grant = await self._host.export_to(_session_of(link), copy)
        return m.OpenedRegion(grant=grant, component=copy.component)

    async def _turn(self, job: JobRecord) -> Result:
        """Give every rank the job's next turn; what rank 0 says of it."""
        self._group.check_life(job.life)
        forget = self.kept.use(job.asker.session, job.body.tensors) if not job.begun else []

        def make_task(link: RankLink) -> m.TurnTask:
            return m.TurnTask(
                task=link.new_task(),
                job=job.number,
                session=job.asker.session,
                body=None if job.begun else job.body,
                regions={} if job.begun else job.regions[link.rank],
                forget=[(key.session, key.digest) for key in forget],
            )

        results = await self._group.run(make_task, job.frames, together=True)
        if isinstance(results[0].outcome, m.Step):
            job.begun, job.frames = True, ()
        return results[0]

    async def _turn_with_more_room(self, job: JobRecord) -> Result:
        """Evict what nobody uses, return cached memory, and try once more."""
        log("job-out-of-memory", "warning", session=job.asker.session)
        keep = frozenset(region for regions in job.regions for region in regions.values())
        for device in dict.fromkeys(self._group.devices):
            room = asyncio.ensure_future(self._host.make_room(device, keep))
            while not room.done():  # what is evicted has to be unmapped here first
                if self._closing:
                    await self._close_regions()
                await asyncio.wait([room], timeout=_LOOK_SECONDS)
            room.result()
        await self._trim()
        result = await self._turn(job)
        if (refusal := _out_of_memory(result)) is not None:
            held = filter(None, map(self._host.name_holders, dict.fromkeys(self._group.devices)))
            text = "; ".join([refusal.message, *held])[: limits.TEXT]
            result = Result(msgspec.structs.replace(refusal, message=text), result.frames)
        return result

    def _pass_on(self, job: JobRecord, result: Result) -> bool:
        """Answer with what rank 0 said; whether the job is finished."""
        outcome, frames = result
        if isinstance(outcome, m.Step):
            if job.cancelled:
                self._drop([job])
            else:
                self._host.answer_step(job.asker, outcome, frames)
            return False
        if isinstance(outcome, m.Opened):
            raise Internal("a rank answered a job's turn as if it had been told to open regions")
        if isinstance(outcome, m.Failed):
            self._drop([job])
        else:
            self._group.worked()
        self._host.answer(job.asker, outcome, frames)
        return True

    # --- helpers

    def _drop(self, jobs: Iterable[JobRecord]) -> None:
        begun = [job.number for job in jobs if job.begun]
        if begun:
            self._dropped_jobs += begun
            self._wake.set()

    def _refuse(self, job: JobRecord, error: SidecarError) -> None:
        self._host.answer(job.asker, m.failed_answer(error))


def _session_of(link: RankLink) -> str:
    if link.session is None:
        raise RankLost(f"rank {link.rank} ended: try again")
    return link.session


def _out_of_memory(result: Result) -> m.Failed | None:
    """The outcome, if it is that."""
    outcome = result.outcome
    return outcome if isinstance(outcome, m.Failed) and outcome.code == OutOfMemory.code else None


def _components(body: m.Job) -> list[tuple[str, str]]:
    """(role, fingerprint) of everything that a job computes with."""
    adapters = getattr(body, "adapters", [])
    return [*body.components.items(), *(("lora", adapter.fingerprint) for adapter in adapters)]
