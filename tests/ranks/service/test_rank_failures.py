"""Ranks, keepers and brokers that die or hang. Each scenario can be repeated by the soak run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from flux_inputs import Inputs, comfy_inputs
from leaks import shared_files
from ranks_scene import (
    EXACT,
    LARGE,
    SMALL,
    RanksScene,
    User,
    is_alive,
    maps,
    running_ranks,
    slow_inputs,
    wait_until,
)
from xdit_sidecar.protocol.errors import DaemonLost, RankLost, RanksUnavailable, SidecarError

DEADLINE = 6.0
KILL_BOUND, HANG_BOUND = 2.0, DEADLINE + 2.0  # seconds until the client is told; promised
SLACK = 3.0  # times: as loosely as a busy machine needs


class Background:
    """A forward in a thread, and how it ended."""

    def __init__(self, user: User, inputs: Inputs) -> None:
        self.error: SidecarError | None = None
        self.output: torch.Tensor | None = None
        self.ended = 0.0
        self._thread = threading.Thread(target=self._work, args=(user, inputs))
        self._thread.start()

    def _work(self, user: User, inputs: Inputs) -> None:
        try:
            self.output = user.forward(inputs, timeout=90)
        except SidecarError as error:
            self.error = error
        self.ended = time.monotonic()

    def wait_until_computing(self, scene: RanksScene) -> None:
        """Returns when the ranks are in the middle of it."""
        wait_until(lambda: scene.group.jobs == 1, 10, "the forward was not begun")
        before = cpu_seconds(scene.rank_pids)
        wait_until(lambda: cpu_seconds(scene.rank_pids) > before + 0.4, 30, "nothing is computed")
        assert not self.ended, "the forward is too short for this test"

    def join(self, seconds: float) -> None:
        """AssertionError if it takes longer."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the client hangs"


def cpu_seconds(pids: list[int]) -> float:
    """What processes have computed so far, together."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def assert_recovers(scene: RanksScene, user: User, starts: int, session: str) -> None:
    """The next forward is right, on the same session, with no byte of the file read again."""
    scene.wait_until_ready(starts + 1)
    inputs = comfy_inputs(SMALL)
    small = scene.file("small")
    with scene.user(small) as again:
        small.hand_over(again.client, reads=False).release()
        assert (again.forward(inputs) - small.alone(inputs)).abs().max() < EXACT
    assert session_of(user) == session
    inputs = comfy_inputs(LARGE)
    large = scene.file("large", LARGE)
    large.hand_over(user.client, reads=False).release()
    assert (user.forward(inputs) - large.alone(inputs)).abs().max() < 10 * EXACT


def session_of(user: User) -> str:
    session = user.client._session
    assert session is not None
    assert not session.lost.is_set()
    return session.welcome.session


def kill_while_idle(scene: RanksScene, user: User, rank: int) -> None:
    """The group starts again, and nobody is told anything."""
    starts, session = scene.starts, session_of(user)
    before = scene.rank_pids
    os.kill(before[rank], signal.SIGKILL)
    assert_recovers(scene, user, starts, session)
    assert not any(is_alive(pid) for pid in before), "a rank of the old group is left"
    assert scene.status.ranks[0].error is None


def kill_while_computing(scene: RanksScene, user: User, rank: int) -> float:
    """A typed, retryable error; seconds until the client had it."""
    starts, session = scene.starts, session_of(user)
    forward = Background(user, slow_inputs())
    forward.wait_until_computing(scene)
    os.kill(scene.rank_pids[rank], signal.SIGKILL)
    killed = time.monotonic()
    forward.join(10 * KILL_BOUND)
    assert isinstance(forward.error, RankLost), forward.error
    assert forward.error.retryable
    assert_recovers(scene, user, starts, session)
    return forward.ended - killed


def stop_while_computing(scene: RanksScene, user: User, rank: int) -> float:
    """The same for a rank that hangs; the daemon's deadline is DEADLINE."""
    starts, session = scene.starts, session_of(user)
    pid = scene.rank_pids[rank]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    forward = Background(user, comfy_inputs(LARGE))
    forward.join(10 * HANG_BOUND)
    assert isinstance(forward.error, RankLost), forward.error
    assert str(rank) in str(forward.error) or "collective" in str(forward.error)
    assert_recovers(scene, user, starts, session)
    assert not is_alive(pid)
    return forward.ended - stopped


def fail_three_times(scene: RanksScene, user: User) -> None:
    """The group is given up, the daemon is not."""
    waiting = None
    while (group := scene.group).state != "degraded":
        pids = [rank.pid for rank in scene.status.ranks if rank.pid]
        if group.state == "ready" or pids:
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
        scene.daemon.wait_for_status(
            lambda s, pids=pids: not {r.pid for r in s.ranks} & set(pids), 20
        )
        if waiting is None:
            waiting = Background(user, comfy_inputs(SMALL))  # waits for ranks that never come
    waiting.join(20)
    assert isinstance(waiting.error, RanksUnavailable), waiting.error
    assert scene.group.error
    assert "rank 0" in scene.group.error
    with pytest.raises(RanksUnavailable, match="restart the daemon"):
        user.forward(comfy_inputs(SMALL))
    with pytest.raises(RanksUnavailable):
        user.ranks.wait_until_ready()
    with scene.user(scene.file("handed-over-degraded", seed=9)):
        assert len(scene.status.components) >= 2
    assert [rank.pid for rank in scene.status.ranks] == [None, None]


def keeper_pid(scene: RanksScene) -> int:
    (pid,) = [device.keeper_pid for device in scene.status.devices]
    assert pid
    return pid


def renew(user: User) -> None:
    """Move a user to a new region, as ComfyUI does when it is told."""
    assert user.held.orphaned.wait(10)
    old, user.held = user.held, user.client.renew(user.held)
    old.release()


def kill_keeper(scene: RanksScene, user: User, *, computing: bool) -> None:
    """Ranks go on with what they have mapped; renewed, the new region is used and the old goes."""
    starts, session = scene.starts, session_of(user)
    inputs = slow_inputs() if computing else comfy_inputs(LARGE)
    expected = user.forward(inputs)
    scene.wait_until_idle()
    before = [maps(pid) for pid in scene.rank_pids]
    forward = Background(user, inputs)
    if computing:
        forward.wait_until_computing(scene)
    else:
        forward.join(30)
    os.kill(keeper_pid(scene), signal.SIGKILL)
    forward.join(60)
    assert forward.output is not None, forward.error
    assert torch.equal(forward.output, expected)
    renew(user)
    assert torch.equal(user.forward(inputs), expected)
    scene.daemon.wait_for_status(lambda s: all(c.state == "resident" for c in s.components))
    scene.daemon.wait_for_status(lambda s: s.devices[0].orphaned == 0)
    wait_until(
        lambda: all(maps(pid) <= most for pid, most in zip(scene.rank_pids, before, strict=True)),
        10,
        "ranks still map the orphan",
    )
    assert (scene.starts, session_of(user)) == (starts, session)


def kill_broker(scene: RanksScene) -> None:
    """Ranks and keepers die with it."""
    pids = [*scene.rank_pids, keeper_pid(scene)]
    os.kill(scene.daemon.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 10, "children outlive the broker")
    assert scene.daemon.process is not None
    scene.daemon.process.wait(10)


def stop_while_it_computes(scene: RanksScene, user: User) -> None:
    """SIGTERM in the middle of a forward: nothing remains."""
    shared = shared_files()
    pids = [*scene.rank_pids, keeper_pid(scene)]
    forward = Background(user, slow_inputs())
    forward.wait_until_computing(scene)
    assert scene.daemon.stop() == 0
    forward.join(10)
    assert isinstance(forward.error, DaemonLost), forward.error
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 5, "processes remain")
    assert list(scene.daemon.runtime_dir.iterdir()) == []
    assert shared_files() <= shared


# --- once each


def test_ranks_that_die(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2, "--deadline", "30") as scene:
        with scene.user(scene.file("large", LARGE)) as user:
            kill_while_idle(scene, user, 0)
            assert kill_while_computing(scene, user, 1) < SLACK * KILL_BOUND
            kill_keeper(scene, user, computing=True)
            kill_keeper(scene, user, computing=False)
            stop_while_it_computes(scene, user)
        assert "Traceback" not in scene.daemon.log


def test_ranks_that_hang_and_ranks_that_are_given_up(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2, "--deadline", str(DEADLINE)) as scene:
        with scene.user(scene.file("large", LARGE)) as user:
            user.forward(comfy_inputs(LARGE))
            assert stop_while_computing(scene, user, 1) < SLACK * HANG_BOUND
            fail_three_times(scene, user)
        assert "Traceback" not in scene.daemon.log


def test_a_broker_that_dies(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2) as scene:
        kill_broker(scene)
