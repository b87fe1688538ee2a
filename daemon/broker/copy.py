"""One component on one device, as the catalog knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...protocol.messages import Component
from . import events as e

State = Literal["allocating", "filling", "sealing", "resident", "orphaned", "freeing"]


@dataclass(slots=True)
class Copy:
    """A component's region and who has to do with it; times in seconds, sizes in bytes."""

    key: e.Key
    component: Component
    region: str
    nbytes: int
    uid: int
    state: State = "allocating"
    filler: str | None = None  # session, until resident
    answer_to: e.Asker | None = None  # the open request that the keeper's next answer decides
    filled_for: e.Asker | None = None  # the hand-over that was answered with Fill
    waiters: list[e.Asker] = field(default_factory=list)
    listeners: set[e.Asker] = field(default_factory=set)  # waiters who want to know how far it is
    filled: int = 0  # as the filler says
    leases: dict[str, e.Asker] = field(default_factory=dict)  # whose request each answered
    last_used: float = 0.0
    retried: bool = False  # an allocation is tried again once, after evicting

    @property
    def holders(self) -> list[str]:
        """The sessions that lease it, sorted."""
        return sorted({asker.session for asker in self.leases.values()})

    def progress(self) -> list[e.TellProgress]:
        """How far it is, for every waiter who wants to know."""
        listening = [waiter for waiter in self.waiters if waiter in self.listeners]
        return [e.TellProgress(waiter, self.filled, self.nbytes) for waiter in listening]

    @property
    def askers(self) -> list[e.Asker]:
        """Everyone who waits for an answer: the filler's request first."""
        return ([self.answer_to] if self.answer_to else []) + self.waiters

    def note(self, event: str, level: Literal["info", "warning"] = "info", **facts: str) -> e.Note:
        """A line for the log about this copy."""
        about: tuple[tuple[str, str | int], ...] = (
            ("component", self.component.label),
            ("role", self.component.role),
            ("device", self.key.device),
            ("bytes", self.nbytes),
        )
        return e.Note(event, (*about, *facts.items()), level)
