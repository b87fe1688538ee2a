"""A rank process: imports, is told which rank it is, meets the others; then it does tasks.

A rank is a client of the broker like any other, so that its leases end with it. It waits
here and never inside a collective. What it imports is the same for all ranks, so that it may be
done long before there is a rank to be.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ...protocol import messages as m
from ...protocol.client.client import Client
from ...protocol.client.deadline import Deadline
from ...protocol.client.session import ClientSession
from ...protocol.errors import BadMessage, SidecarError
from ..child import die_with_parent
from .channel import RankChannel
from .code_cache import code_cache
from .lean_imports import lean_imports

if TYPE_CHECKING:
    from .worker import Worker

_WITH_ALL_PACKAGES = "--with-all-packages"
# Nothing is ever downloaded, and libraries' advice to developers is not for the daemon's log.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
_FOREVER = 10 * 365 * 86400.0


class RankClient(Client):
    """A client that is given work."""

    def serve(self, worker: Worker) -> NoReturn:
        """Do tasks until the daemon is gone; then SidecarError."""
        session = self.session(Deadline(10.0))
        request, frames = m.NextTask(), list[memoryview]()
        while True:
            task, inputs = self._next(session, request, frames)
            outcome, frames = worker.perform(
                task, inputs, lambda number: session.take_descriptor(number, Deadline(10.0))
            )
            request = m.NextTask(
                task=task.task,
                outcome=outcome,
                copied=worker.copied_bytes,
                transformers=worker.transformers,
            )

    def _next(
        self, session: ClientSession, request: m.NextTask, frames: Sequence[memoryview]
    ) -> tuple[m.Task, list[memoryview]]:
        task, inputs = self.exchanges.exchange(session, request, Deadline(_FOREVER), frames)
        if not isinstance(task, m.Task):
            raise BadMessage(f"the daemon gave a {type(task).__name__} for a task")
        return task, inputs


def main() -> int:
    """Entry point of a rank process."""
    parser = argparse.ArgumentParser(prog="xdit-sidecar-rank")
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--backend", choices=["gloo", "nccl"], required=True)
    parser.add_argument("--meeting-file", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument(_WITH_ALL_PACKAGES, dest="with_all_packages", action="store_true")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What a rank that hangs is doing: `kill -USR1` has it written to the daemon's log.
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(_ENVIRONMENT)
    # Each taking all cores, ranks would wait for each other's threads most of the time.
    cores = len(os.sched_getaffinity(0)) // arguments.world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    # torch takes up to 32 processes, which would be in the way of all else.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(8, max(1, cores))))
    # torch's own choice lies in /tmp under a name that anybody can take before.
    if (cache := code_cache()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    channel = RankChannel(arguments.channel)
    # Imports leave little to collect, and looking for it would be a sixth of their CPU seconds.
    gc.disable()
    try:
        # After the environment, and before the hello, which tells the daemon which torch this is.
        try:
            with nullcontext() if arguments.with_all_packages else lean_imports():
                from .worker import Worker, load_engine

                load_engine(gpu=arguments.gpu)
        except Exception as error:  # of other versions' modules, whatever it is
            from .parallel.xfuser_repairs import XfuserUnusable

            if arguments.with_all_packages or isinstance(error, XfuserUnusable):
                raise
            _start_with_all_packages(error)
        gc.freeze()
        gc.enable()
        channel.tell_imported()
        if (assignment := channel.wait_for_assignment()) is None:
            return 0
        worker = Worker.meet(
            rank=assignment.rank,
            world_size=arguments.world_size,
            device=assignment.device,
            backend=arguments.backend,
            meeting_file=arguments.meeting_file,
            deadline=arguments.deadline,
            reserve=assignment.reserve,
            neighbours=assignment.neighbours,
            compiles=assignment.compiles,
        )
    except SidecarError as error:
        channel.refuse(error)
        print(f"xdit-sidecar-rank: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        channel.refuse(error)
        raise
    client = RankClient(arguments.runtime_dir, name=f"rank{assignment.rank}")
    try:
        client.serve(worker)
    except SidecarError:
        return 1
    finally:
        client.close()


def _start_with_all_packages(error: Exception) -> NoReturn:
    """Begin anew in this process's place: some package cannot do without what is left out."""
    print(
        f"xdit-sidecar-rank: imports everything, as it cannot start without: {error}",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], _WITH_ALL_PACKAGES])  # noqa: S606
