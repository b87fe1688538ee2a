"""A catalog with a keeper that answers when told to: for tests without sockets."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque

from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.daemon.broker.catalog import Catalog
from xdit_sidecar.daemon.broker.copy import Copy
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import SidecarError
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.messages import Component

GRANULE = limits.REGION_GRANULE
GPU = "GPU-00000000-0000-0000-0000-000000000000"

Answer = e.GrantFill | e.GrantLease | e.Confirm | e.Refuse
KeeperAsk = e.Allocate | e.Seal | e.Free


def component(name: str, granules: int = 1, tensors: list[TensorSpec] | None = None) -> Component:
    """A component whose region has this many granules of 2 MiB."""
    kind = "nonce" if name.startswith("nonce:") else "bytes"
    return Component(
        fingerprint=f"{kind}:" + hashlib.sha256(name.encode()).hexdigest(),
        role="vae",
        label=name,
        tensors=tensors or [TensorSpec("weight", "U8", [granules * GRANULE])],
    )


def key(name: str, device: str = "cpu", domain: str = "me") -> e.Key:
    return e.Key(domain, component(name).fingerprint, device)


class Scene:
    """Events in by short verbs; instructions sorted into answers, keeper requests and notices.

    Sizes are granules of 2 MiB. Every device has a keeper of ``budget`` granules at the start.
    """

    def __init__(
        self, devices: tuple[str, ...] = ("cpu",), *, budget: int = 10, idle_seconds: float = 0.0
    ) -> None:
        names = (f"{number:032x}" for number in itertools.count(1))
        self.catalog = Catalog(list(devices), idle_seconds=idle_seconds, new_id=lambda: next(names))
        self.now = 0.0
        self.answers: dict[e.Asker, list[Answer]] = {}
        self.keepers: dict[str, deque[KeeperAsk]] = {device: deque() for device in devices}
        self.sent: list[KeeperAsk] = []  # everything that keepers were ever asked
        self.labels: dict[str, str] = {}  # region → component, of all that ever were
        self.orphaned: list[e.NotifyOrphaned] = []
        self._requests = itertools.count(1)
        for device in devices:
            self.keeper_ready(device, budget)

    def do(self, event: e.Event) -> list[e.Instruction]:
        """One event, a second after the last."""
        self.now += 1
        instructions = self.catalog.handle(self.now, event)
        for instruction in instructions:
            match instruction:
                case e.Allocate() | e.Seal() | e.Free():
                    self.keepers[instruction.device].append(instruction)
                    self.sent.append(instruction)
                    if isinstance(instruction, e.Allocate):
                        copy = self.catalog.copies[instruction.region]
                        self.labels[instruction.region] = copy.component.label
                case e.NotifyOrphaned():
                    self.orphaned.append(instruction)
                case e.GrantFill() | e.GrantLease() | e.Confirm() | e.Refuse():
                    self.answers.setdefault(instruction.asker, []).append(instruction)
        return instructions

    # --- what sessions ask

    def asker(self, session: str) -> e.Asker:
        return e.Asker(session, next(self._requests))

    def hand_over(
        self,
        session: str,
        name: str,
        granules: int = 1,
        *,
        device: str = "cpu",
        domain: str = "me",
        tensors: list[TensorSpec] | None = None,
    ) -> e.Asker:
        asker = self.asker(session)
        given = component(name, granules, tensors)
        self.do(e.HandOverAsked(asker, key(name, device, domain), given, uid=1000))
        return asker

    def attach(self, session: str, name: str, *, device: str = "cpu", domain: str = "me"):
        asker = self.asker(session)
        self.do(e.AttachAsked(asker, key(name, device, domain)))
        return asker

    def commit(self, session: str, region: str) -> e.Asker:
        asker = self.asker(session)
        self.do(e.CommitAsked(asker, region))
        return asker

    def abandon(self, session: str, region: str) -> e.Asker:
        asker = self.asker(session)
        self.do(e.AbandonAsked(asker, region))
        return asker

    def release(self, session: str, lease: str) -> e.Asker:
        asker = self.asker(session)
        self.do(e.ReleaseAsked(asker, lease))
        return asker

    def evict(self, session: str, name: str, *, device: str = "cpu", domain: str = "me"):
        asker = self.asker(session)
        self.do(e.EvictAsked(asker, key(name, device, domain)))
        return asker

    def cancel(self, asker: e.Asker) -> None:
        self.do(e.RequestCancelled(asker))

    def end(self, session: str) -> None:
        self.do(e.SessionEnded(session))

    # --- what keepers do

    def keeper_ready(self, device: str = "cpu", budget: int = 10) -> None:
        self.do(e.KeeperReady(device, budget * GRANULE))

    def keeper_lost(self, device: str = "cpu") -> None:
        """It dies with everything that it was asked."""
        self.keepers[device].clear()
        self.do(e.KeeperLost(device))

    def keeper_answers(self, device: str = "cpu") -> KeeperAsk:
        """It does the oldest thing that it was asked."""
        asked = self.keepers[device].popleft()
        match asked:
            case e.Allocate():
                self.do(e.RegionAllocated(asked.region))
            case e.Seal():
                self.do(e.RegionSealed(asked.region))
            case e.Free():
                self.do(e.RegionFreed(asked.region))
        return asked

    def keeper_refuses(
        self, device: str = "cpu", *, free: int = 0, error: SidecarError | None = None
    ) -> None:
        """It cannot do the oldest thing that it was asked; ``free`` granules are left."""
        asked = self.keepers[device].popleft()
        if isinstance(asked, e.Allocate):
            self.do(e.AllocationRefused(asked.region, free * GRANULE, error))
        else:
            assert isinstance(asked, e.Seal)
            assert error is not None
            self.do(e.SealRefused(asked.region, error))

    def settle(self) -> None:
        """Keepers do everything that they were asked."""
        for device, asked in self.keepers.items():
            while asked:
                self.keeper_answers(device)

    # --- whole ways

    def make_filling(self, session: str, name: str, granules: int = 1, **more: str) -> str:
        """The region that this session now fills."""
        asker = self.hand_over(session, name, granules, **more)
        self.settle()
        grant = self.answer(asker)
        assert isinstance(grant, e.GrantFill), grant
        return grant.region

    def make_resident(self, session: str, name: str, granules: int = 1, **more: str) -> str:
        """The lease of the session that filled it."""
        asker = self.commit(session, self.make_filling(session, name, granules, **more))
        self.settle()
        return self.lease(asker).lease

    # --- what came out

    def answer(self, asker: e.Asker) -> Answer | None:
        """The only answer that this request has got, or None."""
        answers = self.answers.get(asker, [])
        assert len(answers) <= 1, f"answered more than once: {answers}"
        return answers[0] if answers else None

    def lease(self, asker: e.Asker) -> e.GrantLease:
        """The answer, which is a lease."""
        granted = self.answer(asker)
        assert isinstance(granted, e.GrantLease), granted
        return granted

    def error(self, asker: e.Asker) -> SidecarError:
        """The answer, which is a refusal."""
        refused = self.answer(asker)
        assert isinstance(refused, e.Refuse), refused
        return refused.error

    def copies(self, name: str) -> list[Copy]:
        """All copies of a component, in every state."""
        return [c for c in self.catalog.copies.values() if c.component.label == name]

    def states(self) -> dict[str, str]:
        """Component → state, of everything that there is one copy of."""
        return {copy.component.label: copy.state for copy in self.catalog.copies.values()}

    def freed(self) -> list[str]:
        """Components whose regions were given to Free, in order."""
        return [self.labels[ask.region] for ask in self.sent if isinstance(ask, e.Free)]
