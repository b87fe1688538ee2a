"""A rank's loop: wait for a task on the control socket, do it, report, wait again.

A rank is a client of the broker like any other, so that its leases end with it. It waits here and
never inside a collective.
"""

from __future__ import annotations

import argparse
import signal
from typing import NoReturn

from ...protocol import limits
from ...protocol.client.client import Client
from ...protocol.client.deadline import Deadline
from ...protocol.errors import SidecarError
from ...protocol.messages import AwaitTask, Done, FinishTask, ProbeTask
from ...protocol.regions.cuda_driver import CudaError
from ..child import die_with_parent
from .probe import perform_probe

_FOREVER = 10 * 365 * 86400.0


class RankClient(Client):
    """A client that is given work."""

    def serve(self) -> NoReturn:
        """Do tasks until the daemon is gone; then SidecarError."""
        deadline = Deadline(_FOREVER)
        session = self.session(Deadline(10.0))
        while True:
            task = self._ask(session, AwaitTask(), ProbeTask, deadline)
            number = task.grant.descriptor
            descriptor = None if number is None else session.take_descriptor(number, deadline)
            try:
                data, error = perform_probe(task, descriptor), None
            except (SidecarError, CudaError, RuntimeError) as failure:
                data, error = b"", str(failure)[: limits.TEXT]
            result = FinishTask(task=task.task, data=data, error=error)
            self._ask(session, result, Done, Deadline(10.0))


def main() -> int:
    """Entry point of a rank process."""
    parser = argparse.ArgumentParser(prog="xdit-sidecar-rank")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import torch  # noqa: F401  before the hello, which tells the daemon which torch this is

    client = RankClient(arguments.runtime_dir, name=f"rank{arguments.rank}")
    try:
        client.serve()
    except SidecarError:
        return 1
    finally:
        client.close()
