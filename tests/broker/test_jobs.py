"""Whose turn it is: sessions in turn, each session's jobs in order, everything bounded."""

from __future__ import annotations

from collections import defaultdict
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from xdit_sidecar.daemon.broker.events import Asker
from xdit_sidecar.daemon.broker.jobs import JobRecord, Jobs
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import Busy

_numbers = count(1)
BODY = m.Forward(components={}, tensors=[])


def make(session: str, nbytes: int = 0) -> JobRecord:
    number = next(_numbers)
    frames = [bytes(nbytes)] if nbytes else []
    return JobRecord(number, Asker(session, number), "me", BODY, frames)


def queue(*sessions: str) -> tuple[Jobs, list[JobRecord]]:
    jobs, made = Jobs(), [make(session) for session in sessions]
    for job in made:
        jobs.add(job)
    return jobs, made


def run_all(jobs: Jobs) -> list[JobRecord]:
    """Every job to its end; the order."""
    order = []
    while (job := jobs.take()) is not None:
        order.append(job)
        jobs.end_turn(finished=True)
    return order


def test_sessions_in_turn_and_each_in_order() -> None:
    jobs, (a1, a2, a3, b1, c1, b2) = queue("a", "a", "a", "b", "c", "b")
    assert run_all(jobs) == [a1, b1, c1, a2, b2, a3]


def test_a_picture_lets_others_forward_between_its_steps() -> None:
    jobs, (picture, other) = queue("a", "b")
    assert jobs.take() is picture
    jobs.end_turn(finished=False)
    assert jobs.take() is other
    jobs.end_turn(finished=True)
    assert jobs.take() is picture


def test_a_session_s_next_job_waits_for_its_picture() -> None:
    jobs, (picture, later) = queue("a", "a")
    for _ in range(3):
        assert jobs.take() is picture
        jobs.end_turn(finished=False)
    assert jobs.take() is picture
    jobs.end_turn(finished=True)
    assert jobs.take() is later


def test_what_waits_is_withdrawn_and_what_runs_is_marked() -> None:
    jobs, (running, waiting) = queue("a", "b")
    jobs.take()
    assert jobs.cancel(waiting.asker) is waiting
    assert not waiting.cancelled
    assert jobs.cancel(running.asker) is running
    assert running.cancelled
    jobs.end_turn(finished=False)
    assert jobs.take() is None
    assert len(jobs) == 0


def test_cancelling_what_is_not_there() -> None:
    jobs, (job,) = queue("a")
    assert jobs.cancel(Asker("a", job.asker.request + 10**6)) is None
    assert jobs.cancel(Asker("b", job.asker.request)) is None
    assert run_all(jobs) == [job]


def test_a_session_s_end_takes_all_of_its_jobs() -> None:
    jobs, (a1, b1, a2) = queue("a", "b", "a")
    jobs.take()
    assert {job.number for job in jobs.cancel_session("a")} == {a1.number, a2.number}
    jobs.end_turn(finished=False)
    assert run_all(jobs) == [b1]


def test_lost_ranks_take_what_they_held_state_of() -> None:
    jobs, (begun, fresh) = queue("a", "b")
    jobs.take()
    begun.begun = True
    jobs.end_turn(finished=False)
    assert jobs.drain_begun() == [begun]
    assert run_all(jobs) == [fresh]


def test_draining_leaves_what_runs() -> None:
    jobs, (running, one, two) = queue("a", "a", "b")
    jobs.take()
    assert {job.number for job in jobs.drain()} == {one.number, two.number}
    assert jobs.running is running


def test_too_many() -> None:
    jobs, _ = queue(*[f"s{number}" for number in range(limits.JOBS)])
    with pytest.raises(Busy) as refused:
        jobs.add(make("one-more"))
    assert refused.value.retryable


def test_too_large_together_but_never_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOB_BYTES", 100)
    jobs = Jobs()
    jobs.add(make("a", 150))
    with pytest.raises(Busy, match="150 bytes"):
        jobs.add(make("b", 1))
    jobs.take()  # what runs does not wait
    jobs.add(make("b", 100))
    jobs.add(make("b", 0))
    assert jobs.waiting_bytes == 100


class Turns(RuleBasedStateMachine):
    """Any order of events: nothing is lost, nobody starves, each session is in order."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = Jobs()
        self.waiting: dict[str, list[JobRecord]] = defaultdict(list)
        self.passed_over: dict[str, int] = defaultdict(int)

    @rule(session=st.sampled_from("abcd"))
    def add(self, session: str) -> None:
        job = make(session)
        self.jobs.add(job)
        self.waiting[session].append(job)

    @precondition(lambda self: self.jobs.running is None)
    @rule()
    def take(self) -> None:
        job = self.jobs.take()
        if job is None:
            assert not any(self.waiting.values())
            return
        session = job.asker.session
        assert self.waiting[session][0] is job
        others = sum(bool(queue) for name, queue in self.waiting.items() if name != session)
        assert self.passed_over.pop(session, 0) <= others + 4
        for name, queue in self.waiting.items():
            if name != session and queue:
                self.passed_over[name] += 1
        assert all(turns <= 4 for turns in self.passed_over.values())

    @precondition(lambda self: self.jobs.running is not None)
    @rule(finished=st.booleans())
    def end_turn(self, finished: bool) -> None:
        job = self.jobs.running
        assert job is not None
        self.jobs.end_turn(finished=finished)
        if finished and not job.cancelled:
            self.waiting[job.asker.session].remove(job)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        everyone = [job for queue in self.waiting.values() for job in queue]
        if not everyone:
            return
        job = data.draw(st.sampled_from(everyone))
        assert self.jobs.cancel(job.asker) is job
        self._forget(job)

    @rule(session=st.sampled_from("abcd"))
    def end_session(self, session: str) -> None:
        found = self.jobs.cancel_session(session)
        assert {job.number for job in found} >= {job.number for job in self.waiting[session]}
        for job in list(self.waiting[session]):
            self._forget(job)

    def _forget(self, job: JobRecord) -> None:
        self.waiting[job.asker.session].remove(job)
        self.passed_over.pop(job.asker.session, None)

    @invariant()
    def counts(self) -> None:
        running = self.jobs.running
        gone = running is not None and running.cancelled
        assert len(self.jobs) == sum(map(len, self.waiting.values())) + gone


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
