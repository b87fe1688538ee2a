"""``xdit-sidecar …`` whose event loop can be blocked: SIGUSR2 makes it sleep for three seconds.

Its process lives on, with threads that work: only the loop does not turn.
"""

from __future__ import annotations

import signal
import sys
import time

from xdit_sidecar.daemon.commands.main import main

BLOCKED_SECONDS = 3.0


def sleep_and_say(*_: object) -> None:
    print("blocked", file=sys.stderr, flush=True)
    time.sleep(BLOCKED_SECONDS)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, sleep_and_say)
    sys.exit(main())
