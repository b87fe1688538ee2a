"""The regions that this process has open: each once, with its users counted.

CUDA allows a handle to be opened once per context, and two node packs or threads may hold the same
component; the second user gets the first one's mapping.
"""

from __future__ import annotations

import os
import queue
import threading

from ..errors import RegionUnavailable
from ..messages import RegionGrant
from .base import RegionMapping
from .cuda_ipc import CudaIpcMapping
from .memfd import MemfdMapping


def _open(grant: RegionGrant, descriptor: int | None, *, writable: bool) -> RegionMapping:
    if grant.kind == "memfd" and descriptor is not None:
        return MemfdMapping(descriptor, grant.nbytes, writable=writable)
    if grant.kind == "cuda_ipc" and grant.handle is not None:
        return CudaIpcMapping(grant.handle, grant.device, grant.nbytes)
    if descriptor is not None:
        os.close(descriptor)
    raise RegionUnavailable(f"the daemon granted a {grant.kind} region and no way to open it")


class RegionTable:
    """Thread-safe. A mapping is closed, synchronised, when its last user releases it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, bool], tuple[RegionMapping, int]] = {}
        self._given_up: queue.SimpleQueue[tuple[RegionGrant, bool]] = queue.SimpleQueue()

    def acquire(
        self, grant: RegionGrant, descriptor: int | None = None, *, writable: bool = False
    ) -> RegionMapping:
        """The mapping of this region. Takes over ``descriptor``, used or not.

        A device region is one mapping before and after commit; a host region is mapped writable
        while it is filled and read-only afterwards. Raises RegionUnavailable.
        """
        key = self._key(grant, writable)
        with self._lock:
            mapping, users = self._open.get(key, (None, 0))
            if mapping is None:
                mapping = _open(grant, descriptor, writable=writable)
            elif descriptor is not None:
                os.close(descriptor)
            self._open[key] = (mapping, users + 1)
        self._collect()
        return mapping

    def release(self, grant: RegionGrant, *, writable: bool = False) -> None:
        """One user less. The last one closes the mapping, so no view of it may be left."""
        with self._lock:
            self._release(grant, writable)
        self._collect()

    def release_later(self, grant: RegionGrant, *, writable: bool = False) -> None:
        """Like :meth:`release`, for finalizers: never waits.

        Garbage is collected in any thread at any moment, also in one that is inside this table;
        then whoever holds the lock does the work when it leaves.
        """
        self._given_up.put((grant, writable))
        self._collect()

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def _collect(self) -> None:
        while not self._given_up.empty() and self._lock.acquire(blocking=False):
            try:
                self._release(*self._given_up.get_nowait())
            except queue.Empty:
                return
            finally:
                self._lock.release()

    def _release(self, grant: RegionGrant, writable: bool) -> None:
        key = self._key(grant, writable)
        mapping, users = self._open.pop(key)
        if users > 1:
            self._open[key] = (mapping, users - 1)
        else:
            mapping.close()

    @staticmethod
    def _key(grant: RegionGrant, writable: bool) -> tuple[str, bool]:
        return grant.region, writable and grant.kind == "memfd"


process_regions = RegionTable()
