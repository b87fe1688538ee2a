"""What must be true of a catalog, from the outside: an independent, simple book-keeping.

It sees only events and instructions. Whatever breaks a promise fails at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from xdit_sidecar.daemon.broker import events as e


@dataclass
class Region:
    """As the keeper and the clients know it."""

    device: str
    nbytes: int
    key: e.Key
    state: str = "allocating"  # allocated, sealing, sealed, freeing, dead (its keeper died)
    filler: str | None = None
    fill: e.Asker | None = None
    leases: dict[str, e.Asker] = field(default_factory=dict)


class Model:
    """Tell it every event with :meth:`before`, every instruction with :meth:`saw`."""

    def __init__(self) -> None:
        self.budgets: dict[str, int | None] = {}
        self.regions: dict[str, Region] = {}  # all that exist or are mapped by someone
        self.open: dict[e.Asker, e.Event] = {}  # unanswered requests
        self.answered: Counter[e.Asker] = Counter()
        self.freed: set[str] = set()
        self.ids: set[str] = set()
        self.to_be_freed: list[Region] = []  # by the event that is being handled

    # --- events

    def before(self, event: e.Event) -> None:
        """``event`` is about to be handled."""
        match event:
            case e.RequestCancelled(asker):
                self._withdraw(lambda waiting: waiting == asker)
            case e.SessionEnded(session):
                self._withdraw(lambda waiting: waiting.session == session)
            case e.RegionAllocated(region):
                self.regions[region].state = "allocated"
            case e.AllocationRefused(region):
                self.regions[region].state = "refused"  # unless it is asked for again
            case e.RegionSealed(region):
                self.regions[region].state, self.regions[region].filler = "sealed", None
            case e.SealRefused(region):
                self.regions[region].state = "allocated"
            case e.RegionFreed(region):
                del self.regions[region]
            case e.KeeperReady(device, budget):
                self.budgets[device] = budget
            case e.KeeperLost(device):
                self.budgets[device] = None
                for region in self.regions.values():
                    if region.device == device:
                        region.state, region.filler = "dead", None
            case e.Ticked() | e.RoomWanted():
                pass
            case _:
                assert event.asker not in self.open
                self.open[event.asker] = event
                self.answered[event.asker] = 0
                if isinstance(event, e.ReleaseAsked) and self._holds(event.asker, event.lease):
                    for region in self.regions.values():
                        region.leases.pop(event.lease, None)

    def _holds(self, asker: e.Asker, lease: str) -> bool:
        return any(
            lease in region.leases and region.leases[lease].session == asker.session
            for region in self.regions.values()
        )

    def _withdraw(self, matches: Callable[[e.Asker], bool]) -> None:
        """These ask no more, and give back what they were given."""
        self.open = {asker: event for asker, event in self.open.items() if not matches(asker)}
        for region in self.regions.values():
            for lease in [lease for lease, holder in region.leases.items() if matches(holder)]:
                del region.leases[lease]
            if region.fill is not None and matches(region.fill) and region.state == "allocated":
                self.to_be_freed.append(region)

    # --- instructions

    def saw(self, instruction: e.Instruction, key_of_region: Callable[[str], e.Key]) -> None:
        """The catalog wants this done."""
        match instruction:
            case e.Allocate(device, region, nbytes):
                self._allocates(device, region, nbytes, key_of_region)
            case e.Seal(device, region):
                known = self.regions[region]
                assert (known.device, known.state) == (device, "allocated")
                known.state = "sealing"
            case e.Free(device, region):
                known = self.regions[region]
                assert known.device == device
                assert region not in self.freed, "freed twice"
                assert not known.leases, "freed what is leased"
                assert known.state in ("allocated", "sealed"), f"freed while {known.state}"
                self.freed.add(region)
                known.state, known.filler = "freeing", None
            case e.Unmap(region):
                known = self.regions[region]
                assert known.state == "dead"
                assert not known.leases, "unmapped what is leased"
            case e.GrantFill(asker, device, region, nbytes):
                asked = self._answers(asker)
                known = self.regions[region]
                assert isinstance(asked, e.HandOverAsked)
                assert asked.key == known.key
                assert (known.device, known.nbytes, known.state) == (device, nbytes, "allocated")
                assert known.fill is None, "a region that another filler may have mapped"
                known.filler, known.fill = asker.session, asker
            case e.GrantLease(asker, device, region, nbytes, lease):
                asked = self._answers(asker)
                known = self.regions[region]
                if isinstance(asked, e.CommitAsked):
                    assert asked.region == region
                else:
                    assert isinstance(asked, e.HandOverAsked | e.AttachAsked)
                    assert asked.key == known.key
                assert (known.device, known.nbytes, known.state) == (device, nbytes, "sealed")
                self._new(lease)
                known.leases[lease] = asker
            case e.Confirm(asker):
                asked = self._answers(asker)
                assert isinstance(asked, e.ReleaseAsked | e.EvictAsked | e.AbandonAsked)
            case e.Refuse(asker, _):
                self._answers(asker)
            case e.NotifyOrphaned(session, region):
                known = self.regions[region]
                holders = {holder.session for holder in known.leases.values()}
                assert known.state == "dead"
                assert session in holders | {known.fill.session if known.fill else None}

    def _allocates(
        self, device: str, region: str, nbytes: int, key_of_region: Callable[[str], e.Key]
    ) -> None:
        budget = self.budgets[device]
        assert budget is not None, "asked a dead keeper"
        if region in self.regions:
            assert self.regions[region].state == "refused"
            self.regions[region].state = "allocating"
        else:
            self._new(region)
            self.regions[region] = Region(device, nbytes, key_of_region(region))
        assert self.used(device) <= budget, "admitted more than the budget"

    def _answers(self, asker: e.Asker) -> e.Event:
        assert asker in self.open, "answered twice, or nobody who asked"
        self.answered[asker] += 1
        return self.open.pop(asker)

    def _new(self, name: str) -> None:
        assert name not in self.ids, "an id was used twice"
        self.ids.add(name)

    # --- after an event

    def after(self) -> None:
        """Everything that the event asked for has been seen. Forgets what nobody has any more."""
        assert all(region.state == "freeing" for region in self.to_be_freed)
        self.to_be_freed.clear()
        gone = [
            name
            for name, region in self.regions.items()
            if region.state == "refused" or (region.state == "dead" and not region.leases)
        ]
        for name in gone:
            del self.regions[name]

    def used(self, device: str) -> int:
        """Bytes of the regions of a device that are not about to be free."""
        return sum(
            region.nbytes
            for region in self.regions.values()
            if region.device == device
            and region.state != "freeing"
            and (region.state != "dead" or region.leases)
        )

    def leases_of(self, session: str) -> int:
        return sum(
            holder.session == session
            for region in self.regions.values()
            for holder in region.leases.values()
        )
