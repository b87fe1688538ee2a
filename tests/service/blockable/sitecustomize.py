"""On PYTHONPATH, for the units as they are: SIGUSR2 blocks a daemon's event loop for good.

Its process lives on, with threads that work: only the loop does not turn. ``blockable_daemon.py``
blocks for a moment only.
"""

from __future__ import annotations

import signal
import time


def block_for_good(*_: object) -> None:
    time.sleep(600)


signal.signal(signal.SIGUSR2, block_for_good)
