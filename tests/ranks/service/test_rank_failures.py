"""Ranks, keepers and brokers that die or hang: some rows of the table that `make soak` repeats."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from flux_inputs import comfy_inputs
from leaks import shared_files
from ranks.service.deaths import DEADLINE, LATE, TOLD, Death, Footprint, children
from ranks.service.phases import Background, Clients
from ranks_scene import SMALL, RanksScene, User, is_alive, running_ranks, wait_until
from xdit_sidecar.protocol.errors import DaemonLost, RanksUnavailable

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# Every signal for every kind of target, and every phase; what takes time is to start ranks again.
DEATHS = (
    Death(KILL, "keeper", "loading"),
    Death(STOP, "broker", "forward"),
    Death(STOP, "keeper", "decode"),
    Death(KILL, "rank 0", "loading"),
    Death(STOP, "rank 1", "forward"),
    Death(KILL, "rank 0", "waiting"),
    Death(KILL, "broker", "idle"),
)


def stop_while_it_computes(clients: Clients) -> None:
    """SIGTERM in the middle of a forward: nothing remains."""
    scene, shared = clients.scene, shared_files()
    family = children(scene)
    (forward,) = clients.begin("forward")
    assert scene.daemon.stop() == 0
    forward.join(10)
    assert isinstance(forward.error, DaemonLost), forward.error
    wait_until(lambda: not any(map(is_alive, family)), 5, "processes remain")
    assert list(scene.daemon.runtime_dir.iterdir()) == []
    assert shared_files() <= shared


def fail_three_times(scene: RanksScene, user: User) -> None:
    """The group is given up, the daemon is not."""
    waiting = None
    while (group := scene.group).state != "degraded":
        pids = [rank.pid for rank in scene.status.ranks if rank.pid]
        if group.state == "ready" or pids:
            for pid in pids[:1]:
                with suppress(ProcessLookupError):  # it may have ended with the other one
                    os.kill(pid, signal.SIGKILL)
        scene.daemon.wait_for_status(
            lambda s, pids=pids: not {r.pid for r in s.ranks} & set(pids), 20
        )
        if waiting is None:  # for ranks that never come
            waiting = Background(lambda: user.forward(comfy_inputs(SMALL)))
    assert waiting is not None
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


@pytest.mark.timeout(400)
def test_who_may_die(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2, "--deadline", str(DEADLINE)) as scene:
        with Clients.of(scene) as clients:
            before = Footprint.of(scene)
            for death in DEATHS:
                assert death.happen(clients) < LATE * TOLD[death.signal], death
            before.check(scene)
            stop_while_it_computes(clients)
        assert "Traceback" not in scene.daemon.log


def test_ranks_that_are_given_up(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2) as scene:
        with scene.user() as user:
            fail_three_times(scene, user)
        assert "Traceback" not in scene.daemon.log
