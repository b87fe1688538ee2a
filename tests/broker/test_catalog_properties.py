"""Random orders of everything that can happen to a catalog, checked against a simple model."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

from catalog_model import Model
from catalog_scene import GPU, GRANULE, KeeperAsk, component, key
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.daemon.broker.catalog import Catalog
from xdit_sidecar.protocol.errors import DeviceUnavailable, StillMapped
from xdit_sidecar.protocol.manifest import TensorSpec

DEVICES = ["cpu", GPU]
NAMES = {"small": 1, "middle": 2, "large": 3}  # granules
SESSIONS = [f"s{i}" for i in range(4)]
OTHER_TABLE = [TensorSpec("other", "U8", [1])]

picks = st.integers(0, 1 << 16)
sessions = st.sampled_from(SESSIONS)
names = st.sampled_from(sorted(NAMES))
devices = st.sampled_from([DEVICES[0], *DEVICES])


class CatalogMachine(RuleBasedStateMachine):
    """Sessions, keepers and time, each doing what it likes."""

    def __init__(self) -> None:
        super().__init__()
        ids = (f"{number:032x}" for number in itertools.count(1))
        self.catalog = Catalog(DEVICES, idle_seconds=30.0, new_id=lambda: next(ids))
        self.model = Model()
        self.alive: set[str] = set()
        self.keepers: dict[str, list[KeeperAsk]] = {device: [] for device in DEVICES}
        self.requests = itertools.count(1)
        self.now = 0.0
        self.known_regions: list[str] = ["f" * 32]
        self.known_leases: list[str] = ["f" * 32]
        self.asked: list[e.Asker] = []

    def do(self, event: e.Event, seconds: float = 1.0) -> None:
        self.now += seconds
        self.model.before(event)
        if (asker := getattr(event, "asker", None)) is not None:
            self.asked.append(asker)
        for instruction in self.catalog.handle(self.now, event):
            self.model.saw(instruction, lambda region: self.catalog.copies[region].key)
            if isinstance(instruction, e.Allocate | e.Seal | e.Free):
                self.keepers[instruction.device].append(instruction)
            elif isinstance(instruction, e.GrantFill):
                self.known_regions.append(instruction.region)
            elif isinstance(instruction, e.GrantLease):
                self.known_leases.append(instruction.lease)
        self.model.after()

    def asker(self, session: str) -> e.Asker:
        self.alive.add(session)
        return e.Asker(session, next(self.requests))

    # --- sessions

    @rule(session=sessions, name=names, device=devices, other=st.integers(0, 9))
    def hand_over(self, session: str, name: str, device: str, other: int) -> None:
        given = component(name, NAMES[name], OTHER_TABLE if other == 0 else None)
        self.do(e.HandOverAsked(self.asker(session), key(name, device), given, 1000))

    @rule(session=sessions, name=names, device=devices)
    def attach(self, session: str, name: str, device: str) -> None:
        self.do(e.AttachAsked(self.asker(session), key(name, device)))

    @rule(session=sessions, name=names, device=devices)
    def evict(self, session: str, name: str, device: str) -> None:
        self.do(e.EvictAsked(self.asker(session), key(name, device)))

    @rule(session=sessions, pick=picks, own=st.booleans())
    def commit(self, session: str, pick: int, own: bool) -> None:
        self._end_fill(e.CommitAsked, session, pick, own)

    @rule(session=sessions, pick=picks, own=st.booleans())
    def abandon(self, session: str, pick: int, own: bool) -> None:
        self._end_fill(e.AbandonAsked, session, pick, own)

    def _end_fill(self, kind: type, session: str, pick: int, own: bool) -> None:
        fills = [name for name, region in self.model.regions.items() if region.filler]
        region = self.known_regions[-1 - pick % len(self.known_regions)]
        if own and fills:
            region = fills[pick % len(fills)]
            session = self.model.regions[region].filler or session
        known = self.model.regions.get(region)
        may = known is not None and known.filler == session and known.state == "allocated"
        asker = self.asker(session)
        self.do(kind(asker, region))
        assert (asker in self.model.open) == may, "refused its filler, or obeyed someone else"

    @rule(session=sessions, pick=picks, own=st.booleans())
    def release(self, session: str, pick: int, own: bool) -> None:
        lease = self.known_leases[-1 - pick % len(self.known_leases)]
        if own:
            for region in self.model.regions.values():
                session = region.leases[lease].session if lease in region.leases else session
        before = {s: self.model.leases_of(s) for s in SESSIONS}
        self.do(e.ReleaseAsked(self.asker(session), lease))
        others = {s: self.model.leases_of(s) for s in SESSIONS if s != session}
        assert others == {s: count for s, count in before.items() if s != session}

    @precondition(lambda self: self.asked)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        self._cancel(self.asked[-1 - pick % len(self.asked)])

    @precondition(lambda self: self.model.open)
    @rule(pick=picks)
    def cancel_unanswered(self, pick: int) -> None:
        self._cancel(list(self.model.open)[pick % len(self.model.open)])

    def _cancel(self, asker: e.Asker) -> None:
        if asker.session in self.alive:
            self.do(e.RequestCancelled(asker))

    @rule(session=sessions, unlikely=st.integers(0, 2))
    def session_ends(self, session: str, unlikely: int) -> None:
        if unlikely == 0 and session in self.alive:
            self.end(session)

    def end(self, session: str) -> None:
        self.alive.discard(session)
        self.do(e.SessionEnded(session))

    # Random steps alone seldom get as far as a component that several sessions lease.

    @rule(session=sessions, name=names, device=devices)
    def hand_over_and_go_on(self, session: str, name: str, device: str) -> None:
        self.hand_over(session, name, device, other=1)
        self._settle()

    @rule()
    def fillers_commit(self) -> None:
        for name, region in list(self.model.regions.items()):
            if region.filler and region.state == "allocated":
                self.do(e.CommitAsked(self.asker(region.filler), name))

    @rule(pick=picks, unlikely=st.integers(0, 1))
    def a_filler_ends(self, pick: int, unlikely: int) -> None:
        fillers = [r.filler for r in self.model.regions.values() if r.filler]
        if fillers and unlikely == 0:
            self.end(fillers[pick % len(fillers)])

    @rule()
    def keepers_catch_up(self) -> None:
        self._settle()

    # --- keepers and time

    @initialize(budgets=st.tuples(st.integers(2, 7), st.integers(2, 7)))
    def keepers_start(self, budgets: tuple[int, int]) -> None:
        for device, budget in zip(DEVICES, budgets, strict=True):
            self.do(e.KeeperReady(device, budget * GRANULE))

    @rule(device=devices)
    def keeper_answers(self, device: str) -> None:
        if self.keepers[device]:
            self._answer(device)

    def _answer(self, device: str) -> None:
        asked = self.keepers[device].pop(0)
        match asked:
            case e.Allocate():
                self.do(e.RegionAllocated(asked.region))
            case e.Seal():
                self.do(e.RegionSealed(asked.region))
            case e.Free():
                self.do(e.RegionFreed(asked.region))

    @rule(device=devices, free=st.integers(0, 3), broken=st.booleans())
    def keeper_refuses(self, device: str, free: int, broken: bool) -> None:
        match self.keepers[device][:1]:
            case [e.Allocate(region=region)]:
                error = DeviceUnavailable("broken") if broken else None
                self.keepers[device].pop(0)
                self.do(e.AllocationRefused(region, free * GRANULE, error))
            case [e.Seal(region=region)]:
                self.keepers[device].pop(0)
                self.do(e.SealRefused(region, StillMapped("a map is open")))

    @rule(device=devices, unlikely=st.integers(0, 5))
    def keeper_dies(self, device: str, unlikely: int) -> None:
        if unlikely == 0 and self.model.budgets[device] is not None:
            self.keepers[device].clear()
            self.do(e.KeeperLost(device))

    @rule(device=devices, budget=st.integers(2, 9))
    def keeper_returns(self, device: str, budget: int) -> None:
        if self.model.budgets[device] is None:
            self.do(e.KeeperReady(device, budget * GRANULE))

    @rule(seconds=st.sampled_from([1.0, 1.0, 1.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.do(e.Ticked(), seconds)

    @rule(device=devices, pick=picks)
    def make_room(self, device: str, pick: int) -> None:
        kept = self.known_regions[-1 - pick % len(self.known_regions)]
        freed = kept in self.model.freed
        self.do(e.RoomWanted(device, frozenset({kept})))
        assert (kept in self.model.freed) == freed

    # --- what holds after each step

    @invariant()
    def books_agree(self) -> None:
        for session in SESSIONS:
            assert self.catalog.leases_of(session) == self.model.leases_of(session)
        for device in DEVICES:
            assert self.catalog.used(device) == self.model.used(device)
        assert set(self.catalog.copies) == set(self.model.regions)

    @invariant()
    def one_copy_per_key(self) -> None:
        current = Counter(
            copy.key
            for copy in self.catalog.copies.values()
            if copy.state not in ("freeing", "orphaned")
        )
        assert not current or max(current.values()) == 1

    @invariant()
    def nothing_of_ended_sessions(self) -> None:
        for copy in self.catalog.copies.values():
            named = {asker.session for asker in [*copy.askers, *copy.leases.values()]}
            assert named <= self.alive
            assert copy.filler is None or copy.filler in self.alive

    @invariant()
    def states_are_consistent(self) -> None:
        for copy in self.catalog.copies.values():
            assert bool(copy.leases) <= (copy.state in ("resident", "orphaned"))
            assert (copy.state == "orphaned") <= bool(copy.leases)
            assert (copy.state == "filling") <= (copy.filler is not None)
            assert bool(copy.waiters) <= (copy.state in ("allocating", "filling", "sealing"))

    # --- the end

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:
            return  # a step has failed: that is what is to be seen
        self._everyone_goes_on()
        assert not self.model.open, "never answered, though keepers and fillers did their part"
        assert all(count <= 1 for count in self.model.answered.values())
        for session in sorted(self.alive):
            self.end(session)
        self._settle()
        left = {copy.state for copy in self.catalog.copies.values()}
        assert left <= {"resident"}, f"left behind: {left}"
        assert not any(copy.leases for copy in self.catalog.copies.values())

    def _settle(self) -> None:
        for device in DEVICES:
            while self.keepers[device]:
                self._answer(device)

    def _everyone_goes_on(self) -> None:
        """Keepers answer and fillers commit, until there is nothing to do."""
        for _ in range(1000):
            self._settle()
            fills = [(n, r.filler) for n, r in self.model.regions.items() if r.filler]
            if not fills:
                return
            for region, filler in fills:
                assert filler is not None
                self.do(e.CommitAsked(self.asker(filler), region))
        raise AssertionError("it never ends")


def run_in_any_order(examples: int, steps: int) -> None:
    """So many random orders, of so many steps."""
    given = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(CatalogMachine, settings=given)


def test_catalog_keeps_its_promises_in_any_order() -> None:
    run_in_any_order(examples=500, steps=60)
