"""An event with patience: set, not set, set at the last moment."""

from __future__ import annotations

import asyncio
import time

from xdit_sidecar.daemon.broker.wake import Wake

FOREVER = 60.0


def test_set_before_and_meanwhile() -> None:
    async def story() -> list[bool]:
        wake = Wake()
        wake.set()
        before = await wake.wait(FOREVER)
        wake.clear()
        asyncio.get_running_loop().call_later(0.01, wake.set)
        meanwhile = await wake.wait(FOREVER)
        wake.clear()
        asyncio.get_running_loop().call_later(0.01, wake.set)
        return [before, meanwhile, await wake.wait(None)]

    assert asyncio.run(story()) == [True, True, True]


def test_patience_ends() -> None:
    async def story() -> tuple[bool, float]:
        began = time.monotonic()
        return await Wake().wait(0.05), time.monotonic() - began

    found, seconds = asyncio.run(story())
    assert not found
    assert seconds >= 0.05


def test_what_came_before_patience_ended_counts_however_late_the_loop_looks() -> None:
    async def story() -> bool:
        wake = Wake()
        asyncio.get_running_loop().call_later(0.01, lambda: (wake.set(), time.sleep(0.1)))
        return await wake.wait(0.05)

    assert asyncio.run(story())


def test_no_timer_is_left() -> None:
    async def story() -> bool:
        wake = Wake()
        wake.set()
        await wake.wait(0.02)
        wake.clear()
        waiting = asyncio.ensure_future(wake.wait(None))
        await asyncio.sleep(0.06)
        woken = waiting.done()
        waiting.cancel()
        return woken

    assert not asyncio.run(story())
