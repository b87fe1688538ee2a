"""Several threads that fill one region: ``preadv``, ``memmove`` and the driver release the GIL."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

from .file_parts import Batch, FilePart, OnBytes, total_bytes

_LOOK_SECONDS = 0.05

Read = Callable[[Batch], None]
"""Brings one batch into the region, for good when it returns."""
OpenReader = Callable[[], AbstractContextManager[Read]]


class ReaderRefused(Exception):
    """A reader cannot be opened here; the text says why. Others may work."""


class Outcome(NamedTuple):
    """What no reader was left for, and why readers could not be opened."""

    unread: list[FilePart]
    refusals: list[str]


def read_in_parallel(
    batches: Iterable[Batch], open_reader: OpenReader, threads: int, on_bytes: OnBytes
) -> Outcome:
    """Read all batches with a reader in each of ``threads`` threads.

    The first error of any thread is raised, and so is what ``on_bytes`` raises; every thread is
    gone and every reader closed by then, so a read that hangs in the kernel is waited for.
    Something stays unread only if no reader could be opened.
    """
    work = _Work(batches)
    crew: list[threading.Thread] = []
    try:
        try:
            for _ in range(threads):
                thread = threading.Thread(
                    target=work.run, args=(open_reader,), name="xdit-sidecar-read", daemon=True
                )
                crew.append(thread)  # first, as an interrupt may come in between
                thread.start()
            work.report(threads, on_bytes)
        finally:
            work.stopped = True
            with contextlib.ExitStack() as joins:
                for thread in crew:
                    joins.callback(_join, thread)
    except BaseException:
        work.failures.clear()
        raise
    # Not through a local variable: error, traceback and frame would be a cycle that keeps the
    # region until garbage is collected.
    if work.failures:
        raise work.failures.pop()
    return Outcome([part for batch in work.batches for part in batch], work.refusals)


def _join(thread: threading.Thread) -> None:
    # However impatient the user is: what it reads into is unmapped next.
    try:
        if thread.ident is not None:
            thread.join()
    except BaseException:
        _join(thread)
        raise


class _Work:
    """What is left to read, and what became of it."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = iter(batches)
        self.stopped = False
        self.failures: list[BaseException] = []  # one at most
        self.refusals: list[str] = []
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: a thread ended

    def report(self, threads: int, on_bytes: OnBytes) -> None:
        """Pass on what is read until all threads have ended."""
        while threads:
            nbytes = self._wait()
            if nbytes is None:
                threads -= 1
            elif not self.failures:
                on_bytes(nbytes)

    def _wait(self) -> int | None:
        # By itself, so that on_bytes never runs while an exception is handled: whatever it opens
        # would keep that, its traceback, and with it the region.
        try:
            return self._done.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            return 0

    def run(self, open_reader: OpenReader) -> None:
        """One thread."""
        try:
            with open_reader() as read:
                while (batch := self._next()) is not None:
                    read(batch)
                    self._done.put(total_bytes(batch))
        except ReaderRefused as error:
            self.refusals.append(str(error))
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            self._fail(error)
        finally:
            self._done.put(None)

    def _next(self) -> Batch | None:
        with self._lock:
            return None if self.stopped else next(self.batches, None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.stopped = True
            if not self.failures:
                self.failures.append(error)
