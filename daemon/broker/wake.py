"""What a coroutine that takes turns waits for: that there is something to do, or patience's end."""

from __future__ import annotations

import asyncio


class Wake:
    """An event with patience.

    ``asyncio.wait_for`` would do, and takes the loop several rounds more until its caller goes on:
    a tenth of a millisecond of each forward.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """There may be something to do."""
        self._event.set()

    def clear(self) -> None:
        """About to look for it."""
        self._event.clear()

    async def wait(self, patience: float | None) -> bool:
        """Whether it was set before so many seconds were over; None: without end."""
        over = False

        def give_up() -> None:
            nonlocal over
            over = not self._event.is_set()
            self._event.set()

        timer = None
        if patience is not None:
            timer = asyncio.get_running_loop().call_later(patience, give_up)
        try:
            await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
        return not over
