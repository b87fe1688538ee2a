"""When a child that failed is started again, and when no more."""

from __future__ import annotations

import pytest
from xdit_sidecar.daemon.broker import child_process
from xdit_sidecar.daemon.broker.child_process import RestartPolicy


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(child_process, "time", clock)
    return clock


def live(policy: RestartPolicy, clock: Clock, seconds: float, *, at_work: bool) -> float | None:
    """One life, and what its end is followed by."""
    policy.started()
    clock.now += seconds
    return policy.failed(at_work=at_work)


@pytest.mark.parametrize("at_work", [False, True])
def test_the_third_failure_in_a_row_is_the_last(clock: Clock, at_work: bool) -> None:
    policy = RestartPolicy()
    ends = [live(policy, clock, 5, at_work=at_work) for _ in range(3)]
    assert ends == [0.0, 1.0, None]


def test_who_lived_long_begins_a_new_row(clock: Clock) -> None:
    policy = RestartPolicy()
    assert [live(policy, clock, 31, at_work=False) for _ in range(9)] == [0.0] * 9


def test_who_hangs_at_its_work_has_not_lived(clock: Clock) -> None:
    """A hang is noticed after a deadline, which is longer than what counts as a life."""
    policy = RestartPolicy()
    assert [live(policy, clock, 61, at_work=True) for _ in range(3)] == [0.0, 1.0, None]


def test_work_ends_the_row(clock: Clock) -> None:
    policy = RestartPolicy()
    for _ in range(9):
        assert live(policy, clock, 5, at_work=True) == 0.0
        policy.worked()


def test_a_failed_start_is_no_life(clock: Clock) -> None:
    policy = RestartPolicy()
    policy.started()
    clock.now += 31
    assert policy.failed() == 0.0
    clock.now += 31
    assert [policy.failed(), policy.failed()] == [1.0, None]
