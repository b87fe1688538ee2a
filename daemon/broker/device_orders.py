"""The order in which a device's keeper is told to free and to allocate.

The catalog counts on it: what it has freed is back before anything that it asks for afterwards is
allocated. A region that ranks have mapped is freed only when they have let go of it; everything
that follows on that device waits behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class DeviceOrders:
    """Calls, in order, per device; held while one of them has not come to its end."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Callable[[], object]]] = {}  # of held devices

    def give(self, device: str, order: Callable[[], object]) -> None:
        """Carry out ``order`` now, or after what the device is held for."""
        if (waiting := self._waiting.get(device)) is None:
            order()
        else:
            waiting.append(order)

    def hold(self, device: str) -> None:
        """What follows has to wait; called by an order."""
        self._waiting.setdefault(device, deque())

    def forget(self, device: str) -> None:
        """Drop what waits: the keeper that it was meant for is gone. The device stays held."""
        if (waiting := self._waiting.get(device)) is not None:
            waiting.clear()

    def release(self, device: str) -> None:
        """Go on, until an order holds the device again."""
        waiting = self._waiting.pop(device, deque())
        while waiting:
            waiting.popleft()()
            if (held := self._waiting.get(device)) is not None:
                held.extend(waiting)
                return
