"""What a test may leave behind: nothing.

A `Snapshot` holds this process's open descriptors, its threads, its children (orphans, too) and the
files in /dev/shm. `find_leaks` waits a moment for what is still closing, then names what is new.
"""

from __future__ import annotations

import gc
import os
import stat
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

PROCESS_GRACE = 5.0  # seconds
THREAD_GRACE = 3.0
FD_GRACE = 3.0
SHM = Path("/dev/shm")
# Children inherit it, so a process is recognised after its parent has died.
OWNER_VARIABLE = "XDIT_SIDECAR_TEST_OWNER"
OWNER = f"{os.getpid()}-{time.monotonic_ns()}"
HARMLESS_TARGETS = ("/dev/null", "/dev/urandom", "/dev/random")
# The CUDA driver opens and keeps these as it likes; a context cannot be torn down under torch.
HARMLESS_PREFIXES = ("/dev/nvidia",)


def mark_children() -> None:
    """From here on, processes started by this one carry its mark in their environment."""
    os.environ[OWNER_VARIABLE] = OWNER


def open_descriptors() -> dict[int, str]:
    """Descriptor → what it refers to; without the ones that do no harm."""
    tracker = getattr(resource_tracker._resource_tracker, "_fd", None)
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
        if target in HARMLESS_TARGETS or target.startswith(HARMLESS_PREFIXES):
            continue
        if int(name) == tracker:
            continue
        found[int(name)] = target
    return found


def child_processes() -> dict[tuple[int, float], str]:
    """(pid, start time) → command line, of every process that came from this one."""
    family = {child.pid: child for child in psutil.Process().children(recursive=True)}
    mark = f"{OWNER_VARIABLE}={OWNER}".encode()
    for pid in psutil.pids():
        if pid in family or pid == os.getpid():
            continue
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                family[pid] = psutil.Process(pid)
        except (OSError, psutil.Error):
            continue
    found = {}
    for pid, process in family.items():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                command = f"{process.name()} (ended, but nobody waited for it)"
            else:
                command = " ".join(process.cmdline())
            if "multiprocessing.resource_tracker" in command:
                continue  # the standard library starts one and keeps it
            found[pid, process.create_time()] = command or process.name()
        except psutil.Error:
            continue
    return found


def shared_files() -> set[str]:
    """The files in /dev/shm that belong to this user."""
    found = set()
    for path in SHM.iterdir() if SHM.is_dir() else ():
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
            found.add(str(path))
    return found


def used_by_others(paths: set[str], family: set[int]) -> set[str]:
    """Those of the files that a process outside the family has mapped or open."""
    used: set[str] = set()
    for pid in psutil.pids():
        if pid in family:
            continue
        try:
            text = Path(f"/proc/{pid}/maps").read_text()
            targets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        except OSError:
            continue
        used |= {path for path in paths if path in targets or path in text}
    return used


@dataclass(frozen=True)
class Snapshot:
    descriptors: dict[int, str]
    processes: dict[tuple[int, float], str]
    threads: frozenset[threading.Thread]
    shared: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            descriptors=open_descriptors(),
            processes=child_processes(),
            threads=frozenset(threading.enumerate()),
            shared=frozenset(shared_files()),
        )


def new_descriptors(before: Snapshot) -> list[str]:
    now = open_descriptors()
    # A number may be closed and used again for the same thing: what counts is how often it is open.
    surplus = Counter(now.values()) - Counter(before.descriptors.values())
    lines = []
    for target, count in surplus.items():
        numbers = [fd for fd, name in now.items() if name == target]
        # The highest numbers are the youngest.
        lines += [f"descriptor {fd}: {target}" for fd in sorted(numbers)[-count:]]
    return lines


def new_processes(before: Snapshot) -> list[str]:
    return [
        f"process {pid}: {command}"
        for (pid, started), command in child_processes().items()
        if (pid, started) not in before.processes
    ]


def new_threads(before: Snapshot) -> list[str]:
    return [
        f"thread {thread.name} ({thread.ident}{', daemon' if thread.daemon else ''})"
        for thread in threading.enumerate()
        if thread not in before.threads
    ]


def new_shared_files(before: Snapshot) -> list[str]:
    paths = shared_files() - before.shared
    if paths:
        # Tests that run beside this one have files there, too.
        family = {os.getpid(), *(pid for pid, _ in child_processes())}
        paths -= used_by_others(paths, family)
    return [f"shared memory {path}" for path in sorted(paths)]


def find_leaks(before: Snapshot, *, patience: float = 1.0) -> list[str]:
    """What is there now, was not there before, and stays: one readable line each.

    Waits up to 5 s for processes and 3 s for anything else, times `patience`.
    """
    start = time.monotonic()
    searches = [
        (new_processes, PROCESS_GRACE),
        (new_threads, THREAD_GRACE),
        (new_descriptors, FD_GRACE),
        (new_shared_files, PROCESS_GRACE),
    ]
    pause = 0.002
    leaks: list[str] = []
    for search, grace in searches:
        found = search(before)
        if found:
            gc.collect()  # cycles may still hold a socket or a process object
            found = search(before)
        while found and time.monotonic() - start < grace * patience:
            time.sleep(pause)
            pause = min(pause * 2, 0.1)
            found = search(before)
        leaks += found
    return leaks
