"""Which components exist, who fills them, who leases them. A pure state machine.

A copy of a component goes through these states::

    allocating -> filling -> sealing -> resident -> freeing -> (gone)
        |            |          |          |
        |            |          |          +-- keeper lost while leased --> orphaned -> (gone)
        +------------+----------+-- filler gone or refused --> freeing; a waiter starts anew

There is never more than one copy of a key that is not freeing or orphaned: whoever hands over the
same component meanwhile waits for it. Only unleased resident copies are evicted, least recently
used first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

from ...protocol import limits
from ...protocol.errors import (
    BadMessage,
    Busy,
    DeviceUnavailable,
    FillLost,
    InUse,
    ManifestMismatch,
    SidecarError,
    UnknownComponent,
    UnknownDevice,
)
from ...protocol.manifest import check_manifest, region_bytes
from ...protocol.messages import Component
from . import events as e
from .admission import choose_crowd, choose_victims, explain_refusal
from .copy import Copy


class Catalog:
    """Give events to :meth:`handle`, carry out the instructions that it returns.

    ``devices`` are those that this daemon serves; each accepts hand-overs from its first
    KeeperReady on. ``idle_seconds`` 0 keeps components until they are evicted for room.
    ``new_id`` makes region and lease ids (32 hexadecimal digits, not guessable).
    """

    def __init__(
        self,
        devices: list[str],
        *,
        idle_seconds: float = 0.0,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.budgets: dict[str, int | None] = dict.fromkeys(devices)  # None: no keeper
        self.copies: dict[str, Copy] = {}  # by region, every state
        self._current: dict[e.Key, Copy] = {}  # allocating … resident
        self._lease_regions: dict[str, str] = {}
        self._held: dict[str, set[str]] = {}  # leases by session
        self.idle_seconds = idle_seconds
        self._new_id = new_id

    # --- what others may ask

    def leases_of(self, session: str) -> int:
        """How many leases a session holds."""
        return len(self._held.get(session, ()))

    def used(self, device: str) -> int:
        """Bytes of a device's regions, orphans included.

        Those being freed do not count: keepers work in order, so that the memory is back before
        anything that is asked for now is allocated.
        """
        copies = [copy for copy in self.copies.values() if copy.key.device == device]
        return sum(copy.nbytes for copy in copies if copy.state != "freeing")

    def use(self, now: float, key: e.Key) -> Copy | None:
        """The copy that a job can compute with, if there is one; that counts as using it."""
        copy = self._current.get(key)
        if copy is None or copy.state != "resident":
            return None
        copy.last_used = now
        return copy

    def is_freeing(self, device: str) -> bool:
        """Whether memory of this device is on its way back."""
        return bool(self._freeing(device))

    def fill_of(self, session: str, region: str) -> Copy:
        """The copy that this session is filling. Raises UnknownComponent."""
        copy = self.copies.get(region)
        if copy is None or copy.state != "filling" or copy.filler != session:
            raise UnknownComponent("no such region is being filled by this session")
        return copy

    # --- events

    def handle(self, now: float, event: e.Event) -> list[e.Instruction]:
        """Apply one event at monotonic time ``now`` (seconds)."""
        return list(self._handle(now, event))

    def _handle(self, now: float, event: e.Event) -> Iterator[e.Instruction]:
        match event:
            case e.HandOverAsked():
                yield from self._hand_over(now, event)
            case e.AttachAsked(asker, key):
                yield from self._attach(now, asker, key)
            case e.FillProgressed(asker, region, nbytes):
                yield from self._progressed(asker, region, nbytes)
            case e.CommitAsked(asker, region):
                yield from self._commit(asker, region)
            case e.AbandonAsked(asker, region):
                yield from self._abandon(now, asker, region)
            case e.ReleaseAsked(asker, lease):
                yield from self._release(now, asker, lease)
            case e.EvictAsked(asker, key):
                yield from self._evict_on_request(asker, key)
            case e.RequestCancelled(asker):
                yield from self._cancelled(now, asker)
            case e.SessionEnded(session):
                yield from self._session_ended(now, session)
            case e.RegionAllocated(region):
                yield from self._allocated(now, region)
            case e.AllocationRefused(region, free, error):
                yield from self._allocation_refused(region, free, error)
            case e.RegionSealed(region):
                yield from self._sealed(now, region)
            case e.SealRefused(region, error):
                yield from self._seal_refused(now, region, error)
            case e.RegionFreed(region):
                yield from self._freed(region)
            case e.KeeperReady(device, budget):
                self.budgets[device] = budget
            case e.KeeperLost(device):
                yield from self._keeper_lost(device)
            case e.RoomWanted(device, keep):
                for copy in [c for c in self._evictable(device) if c.region not in keep]:
                    yield from self._drop(copy, "memory")
            case e.Ticked():
                yield from self._evict_idle(now)

    # --- hand-over

    def _hand_over(self, now: float, event: e.HandOverAsked) -> Iterator[e.Instruction]:
        asker, key = event.asker, event.key
        try:
            self._check_device(key.device)
            check_manifest(event.component.tensors)
            self._check_leases(asker)
            if (copy := self._current.get(key)) is not None:
                if copy.component.tensors != event.component.tensors:
                    raise ManifestMismatch(
                        f"{event.component.label}: this fingerprint was handed over with another "
                        "table of tensors; a different dtype or loader needs its own fingerprint"
                    )
                if copy.state != "resident" and len(copy.waiters) >= limits.WAITERS_PER_COMPONENT:
                    raise Busy(f"{copy.component.label}: too many clients wait for it already")
            else:
                kept = [held for held in self.copies.values() if held.state != "freeing"]
                crowd = choose_crowd(kept, self._evictable(), event.component)
        except SidecarError as error:
            yield e.Refuse(asker, error)
            return
        if copy is None:
            for idle in crowd:
                yield from self._drop(idle, "limit")
            yield from self._begin(now, key, event.component, event.uid, asker)
        elif copy.state == "resident":
            yield self._lease(now, copy, asker)
        else:
            copy.waiters.append(asker)
            if event.progress:
                copy.listeners.add(asker)
                if copy.filled:
                    yield e.TellProgress(asker, copy.filled, copy.nbytes)

    def _begin(
        self,
        now: float,
        key: e.Key,
        component: Component,
        uid: int,
        asker: e.Asker,
        waiters: list[e.Asker] | None = None,
    ) -> Iterator[e.Instruction]:
        """Admit a new copy with ``asker`` as its filler, evicting what nobody leases for room."""
        nbytes = region_bytes(component.tensors)
        budget = self.budgets[key.device] or 0
        missing = self.used(key.device) + nbytes - budget
        if key.is_probe:
            # A health-check must work on a full device and evict nothing: it gets a little more.
            victims: list[Copy] | None = [] if missing <= limits.PROBE_ROOM else None
        else:
            victims = choose_victims(self._evictable(key.device), missing)
        if victims is None:
            free = budget - self.used(key.device)
            error = explain_refusal(component, nbytes, key.device, free, self.copies.values())
            for waiting in [asker, *(waiters or [])]:
                yield e.Refuse(waiting, error)
            return
        for victim in victims:
            yield from self._drop(victim, "budget")
        copy = Copy(key, component, self._new_id(), nbytes, uid, last_used=now)
        copy.filler, copy.answer_to, copy.waiters = asker.session, asker, waiters or []
        self.copies[copy.region] = self._current[key] = copy
        yield e.Allocate(key.device, copy.region, nbytes)

    def _allocated(self, now: float, region: str) -> Iterator[e.Instruction]:
        copy = self.copies.get(region)
        if copy is None or copy.state != "allocating":
            return
        if copy.filler is None:
            yield from self._restart_fills(now, [copy])
            return
        copy.state = "filling"
        if copy.answer_to is not None:
            yield e.GrantFill(copy.answer_to, copy.key.device, copy.region, copy.nbytes)
            copy.filled_for, copy.answer_to = copy.answer_to, None

    def _allocation_refused(
        self, region: str, free: int, error: SidecarError | None
    ) -> Iterator[e.Instruction]:
        copy = self.copies.get(region)
        if copy is None or copy.state != "allocating":
            return
        device = copy.key.device
        # Keepers work in order: what they were told to free since is back before a second try.
        coming = sum(other.nbytes for other in self._freeing(device))
        victims = None
        if copy.askers and not copy.retried and error is None and not copy.key.is_probe:
            victims = choose_victims(self._evictable(device), copy.nbytes - free - coming)
        if victims is not None and (victims or coming):
            copy.retried = True
            for victim in victims:
                yield from self._drop(victim, "memory")
            yield e.Allocate(device, region, copy.nbytes)
            return
        copies = self.copies.values()
        error = error or explain_refusal(copy.component, copy.nbytes, device, free, copies)
        self._forget(copy)
        for asker in copy.askers:
            yield e.Refuse(asker, error)

    def _progressed(self, asker: e.Asker, region: str, nbytes: int) -> Iterator[e.Instruction]:
        """The filler's word; anybody else's is confirmed and forgotten."""
        yield e.Confirm(asker)
        copy = self.copies.get(region)
        if copy is None or copy.state != "filling" or copy.filler != asker.session:
            return
        before, copy.filled = copy.filled, max(copy.filled, min(nbytes, copy.nbytes))
        # Few enough to wait, all of them, with the answer for a client that is stopped meanwhile.
        if copy.filled * 100 // copy.nbytes > before * 100 // copy.nbytes:
            yield from copy.progress()

    def _commit(self, asker: e.Asker, region: str) -> Iterator[e.Instruction]:
        copy = self.copies.get(region)
        if copy is None:
            yield e.Refuse(
                asker, FillLost("the region that was being filled is gone: hand over again")
            )
        elif copy.filler != asker.session or copy.state != "filling":
            yield e.Refuse(asker, UnknownComponent("this session fills no such region"))
        elif copy.key.is_probe:
            yield e.Refuse(
                asker,
                BadMessage(
                    "a component with a nonce for fingerprint is for probes: it is never committed"
                ),
            )
        else:
            copy.state, copy.answer_to = "sealing", asker
            yield e.Seal(copy.key.device, region)

    def _sealed(self, now: float, region: str) -> Iterator[e.Instruction]:
        copy = self.copies.get(region)
        if copy is None or copy.state != "sealing":
            return
        askers = copy.askers
        copy.state, copy.filler, copy.last_used = "resident", None, now
        copy.answer_to, copy.waiters, copy.filled = None, [], copy.nbytes
        copy.listeners.clear()
        yield copy.note("component-resident")
        for asker in askers:
            yield self._lease(now, copy, asker)

    def _seal_refused(
        self, now: float, region: str, error: SidecarError
    ) -> Iterator[e.Instruction]:
        copy = self.copies.get(region)
        if copy is None or copy.state != "sealing":
            return
        if copy.filler is None:
            yield from self._restart_fills(now, [copy])
            return
        copy.state = "filling"
        if copy.answer_to is not None:
            yield e.Refuse(copy.answer_to, error)
            copy.answer_to = None

    def _abandon(self, now: float, asker: e.Asker, region: str) -> Iterator[e.Instruction]:
        try:
            copy = self.fill_of(asker.session, region)
        except UnknownComponent as error:
            yield e.Refuse(asker, error)
            return
        yield from self._restart_fills(now, [copy], confirm=asker)

    def _restart_fills(
        self, now: float, copies: list[Copy], confirm: e.Asker | None = None
    ) -> Iterator[e.Instruction]:
        """The filler is gone: drop its regions, let the first waiter of each fill a fresh one.

        Never the same region: the old filler may be alive and still have it mapped writable. All
        are dropped before the first new one is admitted, which may need their room.
        """
        waiting = [(copy.waiters, copy.listeners) for copy in copies]
        for copy in copies:
            copy.waiters, copy.listeners = [], set()
            yield from self._drop(copy, "abandoned" if confirm else "filler-gone", confirm)
        for copy, (waiters, listeners) in zip(copies, waiting, strict=True):
            if not waiters:
                continue
            first, *others = waiters
            yield from self._begin(now, copy.key, copy.component, copy.uid, first, others)
            if (fresh := self._current.get(copy.key)) is not None:
                fresh.listeners = listeners.intersection(others)

    # --- leases

    def _attach(self, now: float, asker: e.Asker, key: e.Key) -> Iterator[e.Instruction]:
        try:
            self._check_device(key.device)
            if (copy := self._current.get(key)) is None:
                raise UnknownComponent("no such component is resident on this device")
            self._check_leases(asker)
        except SidecarError as error:
            yield e.Refuse(asker, error)
            return
        if copy.state == "resident":
            yield self._lease(now, copy, asker)
        else:
            # Someone fills it right now. It may fail; then the asker is not to become the filler,
            # because it has only a fingerprint: it is told to hand over instead.
            yield e.Refuse(
                asker, UnknownComponent("the component is being filled and not resident yet")
            )

    def _lease(self, now: float, copy: Copy, asker: e.Asker) -> e.GrantLease:
        lease = self._new_id()
        copy.leases[lease] = asker
        copy.last_used = now
        self._lease_regions[lease] = copy.region
        self._held.setdefault(asker.session, set()).add(lease)
        return e.GrantLease(asker, copy.key.device, copy.region, copy.nbytes, lease, copy.component)

    def _release(self, now: float, asker: e.Asker, lease: str) -> Iterator[e.Instruction]:
        copy = self.copies.get(self._lease_regions.get(lease, ""))
        if copy is None or copy.leases[lease].session != asker.session:
            yield e.Refuse(asker, UnknownComponent("this session holds no such lease"))
            return
        yield e.Confirm(asker)
        yield from self._drop_lease(now, lease)

    def _drop_lease(self, now: float, lease: str) -> Iterator[e.Instruction]:
        copy = self.copies.get(self._lease_regions.pop(lease, ""))
        if copy is None:
            return
        session = copy.leases.pop(lease).session
        self._held[session].discard(lease)
        if not self._held[session]:
            del self._held[session]
        copy.last_used = now
        if copy.state == "orphaned" and not copy.leases:
            self._forget(copy)
            yield e.Unmap(copy.region)
            yield copy.note("orphan-gone")

    def _session_ended(self, now: float, session: str) -> Iterator[e.Instruction]:
        self._withdraw(lambda waiting: waiting.session == session)
        for lease in list(self._held.get(session, ())):
            yield from self._drop_lease(now, lease)
        fills = [copy for copy in self.copies.values() if copy.filler == session]
        yield from self._restart_fills(now, fills)

    def _cancelled(self, now: float, asker: e.Asker) -> Iterator[e.Instruction]:
        """The asker gave up, perhaps while its answer was on the way: take back what it got."""
        self._withdraw(lambda waiting: waiting == asker)
        for lease in list(self._held.get(asker.session, ())):
            if self.copies[self._lease_regions[lease]].leases[lease] == asker:
                yield from self._drop_lease(now, lease)
        granted = [
            c for c in self.copies.values() if c.state == "filling" and c.filled_for == asker
        ]
        yield from self._restart_fills(now, granted)

    def _withdraw(self, matches: Callable[[e.Asker], bool]) -> None:
        """Forget askers that no longer wait."""
        for copy in self.copies.values():
            copy.waiters = [waiting for waiting in copy.waiters if not matches(waiting)]
            if copy.answer_to is not None and matches(copy.answer_to):
                copy.answer_to = None
                if copy.state in ("allocating", "sealing"):
                    copy.filler = None  # what becomes of it is decided by the keeper's answer

    # --- eviction

    def _evict_on_request(self, asker: e.Asker, key: e.Key) -> Iterator[e.Instruction]:
        copy = self._current.get(key)
        if copy is None or copy.state != "resident":
            yield e.Refuse(asker, UnknownComponent("no such component is resident on this device"))
        elif copy.leases:
            yield e.Refuse(
                asker,
                InUse(
                    f"{copy.component.label} is used by {', '.join(copy.holders)}: close those "
                    "clients or let them drop the model, then evict"
                ),
            )
        else:
            yield from self._drop(copy, "request", confirm=asker)

    def _evict_idle(self, now: float) -> Iterator[e.Instruction]:
        if not self.idle_seconds:
            return
        for copy in list(self._evictable()):
            if now - copy.last_used >= self.idle_seconds:
                yield from self._drop(copy, "idle")

    def _evictable(self, device: str | None = None) -> Iterator[Copy]:
        for copy in self._current.values():
            wanted = device is None or copy.key.device == device
            if wanted and copy.state == "resident" and not copy.leases:
                yield copy

    def _drop(
        self, copy: Copy, reason: str, confirm: e.Asker | None = None
    ) -> Iterator[e.Instruction]:
        """Free a copy's region; ``confirm`` is answered when the keeper has done so."""
        copy.state, copy.filler, copy.answer_to = "freeing", None, confirm
        self._current.pop(copy.key, None)
        yield copy.note("component-dropped", reason=reason)
        yield e.Free(copy.key.device, copy.region)

    def _freed(self, region: str) -> Iterator[e.Instruction]:
        copy = self.copies.pop(region, None)
        if copy is not None and copy.answer_to is not None:
            yield e.Confirm(copy.answer_to)

    def _forget(self, copy: Copy) -> None:
        """Remove a copy whose region no longer exists."""
        self.copies.pop(copy.region, None)
        if self._current.get(copy.key) is copy:
            del self._current[copy.key]

    # --- keepers

    def _keeper_lost(self, device: str) -> Iterator[e.Instruction]:
        self.budgets[device] = None
        for copy in [copy for copy in self.copies.values() if copy.key.device == device]:
            if copy.state in ("orphaned", "freeing"):
                yield from self._freed(copy.region) if copy.state == "freeing" else ()
                continue
            self._forget(copy)
            error = FillLost(
                f"{copy.component.label}: the keeper of {device} died while the component was "
                "handed over; hand it over again"
            )
            for asker in copy.askers:
                yield e.Refuse(asker, error)
            # Those who only asked, or were never told of the region, have been refused above.
            fillers = [copy.filler] if copy.filler and copy.state != "allocating" else []
            for session in [*copy.holders, *fillers]:
                yield e.NotifyOrphaned(session, copy.region)
            if copy.leases:
                copy.state = "orphaned"
                self.copies[copy.region] = copy
                yield copy.note("component-orphaned", level="warning")
            else:
                yield e.Unmap(copy.region)

    # --- helpers

    def _check_device(self, device: str) -> None:
        if device not in self.budgets:
            served = ", ".join(self.budgets) or "none"
            raise UnknownDevice(f"this daemon does not serve {device}; it serves {served}")
        if self.budgets[device] is None:
            raise DeviceUnavailable(
                f"the keeper of {device} is not ready: `xdit-sidecar status` shows why"
            )

    def _check_leases(self, asker: e.Asker) -> None:
        if self.leases_of(asker.session) >= limits.LEASES_PER_SESSION:
            raise Busy(f"this session holds {limits.LEASES_PER_SESSION} leases: release some")

    def _freeing(self, device: str) -> list[Copy]:
        copies = self.copies.values()
        return [copy for copy in copies if copy.key.device == device and copy.state == "freeing"]
