"""The process that ranks are forked from: it imports what they need, once for all of them.

It has no session, no CUDA context, and has never asked the driver for anything: CUDA cannot be
used in a process forked from one that has. What it forks ends with it, and it with the broker.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from ...protocol.frames import StreamClosed
from ..child import die_with_parent
from .channel import Channel
from .code_cache import code_cache
from .lean_imports import lean_imports
from .messages import Ended, Forked, Imported, NotForked
from .process import RankArguments, run_rank

_WITH_ALL_PACKAGES = "--with-all-packages"
# Nothing is ever downloaded, and libraries' advice to developers is not for the daemon's log.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class ForkServer:
    """Forks when the broker says so, and tells it what became of the processes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._children: dict[int, int] = {}  # pidfd → pid
        self._poller = select.poll()
        self._poller.register(channel, select.POLLIN)

    def serve(self) -> int | None:
        """In a forked process: the descriptor of its own channel. Here, in the end: None.

        That is when the broker has hung up, and all that was forked is ended.
        """
        while True:
            for descriptor, _ in self._poller.poll():
                if descriptor in self._children:
                    self._reap(descriptor)
                    continue
                try:
                    orders = self._channel.read()
                except StreamClosed:
                    self._end_all()
                    return None
                for _order in orders:
                    if (channel := self._fork()) is not None:
                        return channel

    def _fork(self) -> int | None:
        channel = self._channel.take_descriptor()
        try:
            pid = os.fork()
        except OSError as error:  # no processes or memory left
            self._channel.tell(NotForked(f"a rank process could not be forked: {error}"))
        else:
            if not pid:
                self._leave()
                return channel
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = pid
            self._poller.register(pidfd, select.POLLIN)
            self._channel.tell(Forked(pid))
        os.close(channel)
        return None

    def _leave(self) -> None:
        """In a forked process: let go of what is the fork server's."""
        self._channel.close()
        for pidfd in self._children:
            os.close(pidfd)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        self._channel.tell(Ended(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))

    def _end_all(self) -> None:
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in list(self._children):
            self._reap(pidfd)


def main() -> int:
    """Entry point of the fork server, and of the processes that it forks."""
    arguments = _parse()
    die_with_parent(arguments.parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What a rank that hangs is doing: `kill -USR1` has it written to the daemon's log.
    faulthandler.register(signal.SIGUSR1)
    _set_environment(arguments.world_size)
    channel = Channel(arguments.channel)
    # Imports leave little to collect, and looking for it would be a sixth of their CPU seconds.
    gc.disable()
    try:
        _import(gpu=arguments.gpu, lean=not arguments.with_all_packages)
    except Exception as error:
        channel.refuse(error)
        raise
    gc.freeze()  # and what ranks collect later leaves it alone, so that it stays shared
    channel.tell(Imported())
    pid = os.getpid()
    forked = ForkServer(channel).serve()
    if forked is None:
        return 0
    die_with_parent(pid)
    gc.enable()
    rank = RankArguments(
        **{name: getattr(arguments, name) for name in RankArguments.__annotations__}
    )
    return run_rank(rank, Channel(forked))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xdit-sidecar-ranks")
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--backend", choices=["gloo", "nccl"], required=True)
    parser.add_argument("--meeting-file", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument(_WITH_ALL_PACKAGES, dest="with_all_packages", action="store_true")
    return parser.parse_args()


def _set_environment(world_size: int) -> None:
    os.environ.update(_ENVIRONMENT)
    # Each taking all cores, ranks would wait for each other's threads most of the time.
    cores = len(os.sched_getaffinity(0)) // world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    # numpy starts its threads when it is imported; a fork leaves them behind.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # torch takes up to 32 processes, which would be in the way of all else.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(8, max(1, cores))))
    # Products with workspace clear some of it first: 8 µs of a recorded one that takes 60. Those
    # without are as fast, or faster (CUDA 13.0 on an H200).
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
    # torch's own choice lies in /tmp under a name that anybody can take before.
    if (cache := code_cache()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))


def _import(*, gpu: bool, lean: bool) -> None:
    """After the environment is set, which is read by what is imported."""
    try:
        with lean_imports() if lean else nullcontext():
            import torch

            from .unasked_driver import check_unasked, unasked_driver

            # In a process of its own: the driver must not be asked in this one.
            cuda = gpu and _ask_elsewhere(torch.cuda.is_available)
            with unasked_driver():
                from .worker import load_engine, load_text_encoders

                load_engine("cuda" if cuda else "cpu")
        with lean_imports(needed="transformers") if lean else nullcontext(), unasked_driver():
            load_text_encoders()
        check_unasked()
    except Exception as error:  # of other versions' modules, whatever it is
        from .parallel.xfuser_repairs import XfuserUnusable

        if not lean or isinstance(error, XfuserUnusable):
            raise
        _start_with_all_packages(error)


def _ask_elsewhere(question: Callable[[], bool]) -> bool:
    """The answer of a forked process; False if it ends without one."""
    pid = os.fork()
    if not pid:
        answer = False
        try:
            answer = question()
        finally:
            os._exit(0 if answer else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _start_with_all_packages(error: Exception) -> NoReturn:
    """Begin anew in this process's place: some package cannot do without what is left out."""
    print(
        f"xdit-sidecar-ranks: imports everything, as it cannot start without: {error}",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], _WITH_ALL_PACKAGES])  # noqa: S606
