"""The ranks as one, with processes that end when they are told to: their life cycle alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest
from xdit_sidecar.daemon.broker import rank_group, rank_link
from xdit_sidecar.daemon.broker.events import Asker
from xdit_sidecar.daemon.broker.rank_group import RankGroup
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import RankLost, RanksUnavailable

SOON = 0.1


class Process:
    """A rank's process; ``obeys``: whether a kill ends it, as none does that hangs in a driver."""

    all: ClassVar[list[Process]] = []

    def __init__(
        self, _server: object, _assignment: object, on_exit: Callable[[int | None], None]
    ) -> None:
        self.pid = 1000 + len(self.all)
        self.error: str | None = None
        self.obeys = True
        self.ended = False
        self._on_exit = on_exit
        self.all.append(self)

    def kill(self) -> None:
        if self.obeys and not self.ended:
            asyncio.get_running_loop().call_soon(self.end)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._on_exit(-9)

    def discard(self) -> None:
        self.ended = True


class Scene:
    """A group of two, and whatever it told."""

    def __init__(self, directory: Path) -> None:
        self.lost: list[RankLost] = []
        self.group = RankGroup(
            ["cpu", "cpu"],
            directory,
            deadline=0.2,
            reserve=0,
            deliver=lambda *_: None,
            on_lost=self.lost.append,
            on_change=lambda: None,
        )
        self.group.start()

    @property
    def processes(self) -> list[Process]:
        """Of the ranks that there are."""
        return Process.all[-2:]

    async def get_ready(self) -> None:
        """All ranks ask for their first task."""
        await until(lambda: self.group.state == "starting" and not self.group._ending)
        for link in self.group.links:
            request = m.NextTask(task=0, outcome=None)
            link.asks(Asker(f"s{link.rank}", 1), request, ())
        assert self.group.state == "ready"

    async def hang(self) -> None:
        """A task that nobody finishes."""
        with pytest.raises(RankLost, match="did not finish a task"):
            await self.group.run(lambda link: m.TrimTask(task=link.new_task()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_link, "RankProcess", Process)
    monkeypatch.setattr(rank_group, "_GRACE_SECONDS", SOON)
    monkeypatch.setattr(rank_group, "_END_SECONDS", 0.5)


def play(directory: Path, story: Callable[[Scene], Awaitable[None]]) -> None:
    async def scenario() -> None:
        scene = Scene(directory)
        try:
            await story(scene)
        finally:
            scene.group.close()

    asyncio.run(scenario())


def test_three_hangs_in_a_row_degrade_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although each group lived for longer than what counts as a life: it never did any work."""
    monkeypatch.setattr("xdit_sidecar.daemon.broker.child_process._STABLE_SECONDS", 0.1)

    async def story(scene: Scene) -> None:
        for _ in range(3):
            await scene.get_ready()
            await scene.hang()
            await until(lambda: not scene.group._ending)
        assert scene.group.state == "degraded"
        assert scene.group.starts == 3
        assert "three times in a row" in str(scene.group.explain())

    play(tmp_path, story)


def test_what_they_work_on_ends_before_they_do(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        await scene.get_ready()
        for process in scene.processes:
            process.obeys = False
        await scene.hang()
        assert not any(process.ended for process in scene.processes)
        assert len(scene.lost) == 1

    play(tmp_path, story)


def test_a_process_that_does_not_end_is_told_of(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        await scene.get_ready()
        stuck = scene.processes[1]
        stuck.obeys = False
        await scene.hang()
        await until(lambda: scene.group.state == "degraded")
        why = scene.group.explain()
        assert isinstance(why, RanksUnavailable)
        assert f"process {stuck.pid} was killed" in str(why)
        assert "three times" not in str(why)
        stuck.end()
        await scene.get_ready()
        assert scene.group.starts == 2
        assert scene.group.error is None

    play(tmp_path, story)


def test_work_for_ranks_that_are_gone_is_not_given_to_the_next(tmp_path: Path) -> None:
    async def story(scene: Scene) -> None:
        await scene.get_ready()
        life = scene.group.starts
        scene.group.check_life(life)
        scene.group.restart("for a test")
        await until(lambda: scene.group.starts == life + 1)
        with pytest.raises(RankLost, match="restarted meanwhile"):
            scene.group.check_life(life)

    play(tmp_path, story)


def test_a_rank_that_exchanges_by_nccl_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(scene: Scene) -> None:
        await scene.get_ready()
        link = scene.group.links[1]
        for reason in (None, "no room", "no room", "another reason"):
            request = m.NextTask(task=0, outcome=None, by_nccl=reason)
            link.asks(Asker("s1", 1), request, ())
            assert link.by_nccl == reason

    play(tmp_path, story)
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
        'exchange-by-nccl rank=1 reason="no room"',
        'exchange-by-nccl rank=1 reason="another reason"',
    ]
