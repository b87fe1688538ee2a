"""The ranks are told of the end of every session that had them work, whatever it sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from unittest.mock import Mock

from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.daemon.broker.job_service import JobService
from xdit_sidecar.daemon.broker.rank_link import Result
from xdit_sidecar.protocol import messages as m


class OneRank:
    """A rank group of one that answers every task at once, and remembers them."""

    def __init__(self) -> None:
        self.state, self.devices, self.starts = "ready", ["cpu"], 1
        self.links = [SimpleNamespace(rank=0, device="cpu", transformers=[], new_task=lambda: 1)]
        self.tasks: list[m.Task] = []

    async def run(self, make_task, *_, **__):  # type: ignore[no-untyped-def]
        self.tasks += [make_task(link) for link in self.links]
        done = m.Output([]) if isinstance(self.tasks[-1], m.TurnTask) else m.Done()
        return [Result(done, ())]

    def worked(self) -> None: ...

    def check_life(self, life: int) -> None: ...


async def tasks_after_the_end(*, works: bool) -> list[m.Task]:
    """What the ranks are told when a session ends that had, or had not, a job without digests."""
    group = OneRank()
    service = JobService(Mock(), group)  # type: ignore[arg-type]
    service.start()
    if works:
        body = m.EncodeText(components={}, tensors=[])
        service.submit(e.Asker("user", 1), "domain", body, ())
    await asyncio.sleep(0.05)
    done = len(group.tasks)
    service.session_ended("user")
    await asyncio.sleep(0.05)
    service.close()
    return group.tasks[done:]


def test_the_end_of_a_session_that_sent_no_digests() -> None:
    (task,) = asyncio.run(tasks_after_the_end(works=True))
    assert isinstance(task, m.DropTask)
    assert task.sessions == ["user"]


def test_the_end_of_a_session_without_jobs_is_no_news() -> None:
    assert asyncio.run(tasks_after_the_end(works=False)) == []
