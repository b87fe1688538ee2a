"""The regions that this process has open: each once, with its users counted.

CUDA allows a handle to be opened once per context, and two node packs or threads may hold the same
component; the second user gets the first one's mapping.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator

from ..errors import RegionUnavailable
from ..messages import RegionGrant
from .base import RegionMapping
from .cuda_ipc import CudaIpcMapping
from .memfd import MemfdMapping

_Key = tuple[str, bool]
_MOMENT = 0.05  # seconds

_log = logging.getLogger(__name__)


def _open(grant: RegionGrant, descriptor: int | None, *, writable: bool) -> RegionMapping:
    if grant.kind == "memfd" and descriptor is not None:
        return MemfdMapping(descriptor, grant.nbytes, writable=writable)
    if grant.kind == "cuda_ipc" and grant.handle is not None:
        return CudaIpcMapping(grant.handle, grant.device, grant.nbytes)
    if descriptor is not None:
        os.close(descriptor)
    raise RegionUnavailable(f"the daemon granted a {grant.kind} region and no way to open it")


class _Entry:
    """One mapping: being opened, open (then ``settled`` is set), or being closed."""

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.mapping: RegionMapping | None = None
        self.users = 0
        self.refusal: str | None = None
        self.settled = threading.Event()


class RegionTable:
    """Thread-safe. A mapping is closed, synchronised, when its last user releases it.

    Nothing but the books is kept under the lock: opening a device region may make a CUDA context,
    and closing one waits for whatever kernels run. Who asks for a region in the meantime waits for
    that region only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[_Key, _Entry] = {}
        self._given_up: queue.SimpleQueue[_Key] = queue.SimpleQueue()
        # For the closer, the thread that lives as long as there are device regions: what to close,
        # or None when it may be time to end. It is never started by a finalizer.
        self._to_close: queue.SimpleQueue[_Key | None] = queue.SimpleQueue()
        self._closer: threading.Thread | None = None

    def acquire(
        self, grant: RegionGrant, descriptor: int | None = None, *, writable: bool = False
    ) -> RegionMapping:
        """The mapping of this region. Takes over ``descriptor``, used or not.

        A device region is one mapping before and after commit; a host region is mapped writable
        while it is filled and read-only afterwards. Raises RegionUnavailable.
        """
        key = self._key(grant, writable)
        try:
            while True:
                with self._books():
                    entry = self._entries.get(key)
                    if entry is None:
                        entry = self._enter(key, on_device=grant.kind != "memfd")
                        break
                    settled = entry.settled
                    if settled.is_set() and entry.mapping is not None:
                        entry.users += 1
                        return entry.mapping
                settled.wait()
                if entry.refusal is not None:
                    raise RegionUnavailable(entry.refusal)
            taken, descriptor = descriptor, None
            return self._fill(key, entry, grant, taken, writable=writable)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def release(self, grant: RegionGrant, *, writable: bool = False) -> None:
        """One user less. The last one closes the mapping, so no view of it may be left."""
        key = self._key(grant, writable)
        with self._books():
            unused = self._count_down(key)
        if unused is not None:
            self._close(key, unused)

    def release_later(self, grant: RegionGrant, *, writable: bool = False) -> None:
        """Like :meth:`release`, for finalizers.

        Garbage is collected in any thread at any moment, also in one that is inside this table or
        inside the CUDA driver. So a device region is closed by the closer (:meth:`collect` waits
        for it); a host region at once, or when whoever has the lock leaves. The map of a fill is
        waited for a moment, as commit needs it to be gone.
        """
        key = self._key(grant, writable)
        self._given_up.put(key)
        self._settle_up(_MOMENT if key[1] else 0.0)

    def collect(self, timeout: float) -> bool:
        """Wait until every mapping without users is closed; whether that came about."""
        deadline = time.monotonic() + timeout
        with self._books():
            pass
        with self._books():
            entries = self._entries.values()
            closing = [found.settled for found in entries if found.mapping and not found.users]
        return all(event.wait(max(0.0, deadline - time.monotonic())) for event in closing)

    def __len__(self) -> int:
        with self._books():
            return len(self._entries)

    @contextlib.contextmanager
    def _books(self) -> Iterator[None]:
        """The lock, and what finalizers left to do meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._settle_up()

    def _settle_up(self, patience: float = 0.0) -> None:
        while not self._given_up.empty() and self._lock.acquire(timeout=patience):
            try:
                key = self._given_up.get_nowait()
                unused = self._count_down(key)
                if unused is None:
                    continue
                if unused.on_device:
                    self._to_close.put(key)
                else:
                    # munmap: cheap, and it waits for nothing.
                    self._drop(key)
                    if unused.mapping is not None:
                        unused.mapping.close()
            except queue.Empty:
                return
            finally:
                self._lock.release()

    # --- all of these with the lock held

    def _enter(self, key: _Key, *, on_device: bool) -> _Entry:
        if on_device and self._closer is None:
            closer = threading.Thread(
                target=self._close_unused, name="xdit-sidecar-regions", daemon=True
            )
            closer.start()
            self._closer = closer
        entry = self._entries[key] = _Entry(on_device=on_device)
        return entry

    def _count_down(self, key: _Key) -> _Entry | None:
        """The entry if it is now to be closed."""
        entry = self._entries[key]
        entry.users -= 1
        if entry.users:
            return None
        entry.settled = threading.Event()
        return entry

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        if entry.on_device:
            self._to_close.put(None)

    # --- all of these without it

    def _fill(
        self,
        key: _Key,
        entry: _Entry,
        grant: RegionGrant,
        descriptor: int | None,
        *,
        writable: bool,
    ) -> RegionMapping:
        try:
            mapping = _open(grant, descriptor, writable=writable)
        except BaseException as error:
            # Text only: an error would keep this thread's frames. Others than this one, like an
            # interrupt, are no business of those who wait: they try for themselves.
            if isinstance(error, RegionUnavailable):
                entry.refusal = str(error)
            with self._books():
                self._drop(key)
            entry.settled.set()
            raise
        with self._books():
            entry.mapping = mapping
            entry.users = 1
            # Inside, as who comes next may replace the event.
            entry.settled.set()
        return mapping

    def _close(self, key: _Key, entry: _Entry) -> None:
        try:
            if entry.mapping is not None:
                entry.mapping.close()
        finally:
            with self._books():
                self._drop(key)
            entry.settled.set()

    def _close_unused(self) -> None:
        while True:
            key = self._to_close.get()
            if key is not None:
                try:
                    self._close(key, self._entries[key])
                except Exception as error:  # noqa: BLE001  the next one must still be closed
                    _log.warning("closing a region failed: %s", error)
                continue
            with self._books():
                if not any(entry.on_device for entry in self._entries.values()):
                    self._closer = None
                    return

    @staticmethod
    def _key(grant: RegionGrant, writable: bool) -> _Key:
        return grant.region, writable and grant.kind == "memfd"


process_regions = RegionTable()
