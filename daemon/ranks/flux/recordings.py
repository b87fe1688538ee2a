"""Which forwards are recorded: those that come often, while there is room.

A recording costs as much as ten replays save, and memory. So short runs go without, and ranks that
have all tokens of their rows, which the GPU keeps busy for longer than a launch takes, as well.

Recording, and every replay, are steps of all ranks of a group together. So every decision here
follows from what all of them have seen, or is asked of all of them. A replay's exchanges have no
deadline of their own: a collective that has one must follow before a rank waits for the output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.process_group import RankGroup
from ..parallel.rotation import KeptRotations
from ..parallel.transformer import FluxInputs
from ..reservation import Reservation
from .recording import Graph, RecordedForward

#: Equal keys: the same owner, code, exchange, kind of inputs and LoRAs.
Key = tuple[object, *tuple[Hashable, ...]]

_MOST = 4  # recordings at a time
_FIRST = 6  # times that a kind of forward comes until it is recorded
_LONGEST_REASON = 200
_MOST_COUNTED = 64  # kinds of forwards whose number is remembered


@dataclass(frozen=True)
class Recordable:
    """A forward that may be recorded, as it just ran."""

    inputs: FluxInputs
    output: Tensor  # what it gave
    compute: Callable[[FluxInputs], Tensor]
    rotations: KeptRotations
    nbytes: int  # of activations, at most
    read: object = None  # by ``compute``, and kept by nobody else


class Recordings:
    """Of all transformers of a rank."""

    def __init__(
        self,
        group: RankGroup,
        reservation: Reservation,
        make_graph: Callable[[], Graph] | None,
    ) -> None:
        """``make_graph``: None where the device knows no graphs, or what travels between ranks is
        not in them, and nothing is recorded."""
        self._group = group
        self._reservation = reservation
        self._make_graph = make_graph
        self._kept: OrderedDict[Key, RecordedForward] = OrderedDict()
        self._seen: OrderedDict[Key, int] = OrderedDict()
        self.refusal: str | None = None  # why nothing is recorded any more

    def replay(self, key: Key, inputs: FluxInputs) -> Tensor | None:
        """The forward of these inputs, if those of this ``key`` are recorded."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key].replay(inputs)

    def offer(
        self, key: Key, make: Callable[[], Recordable | None], *, trusted: bool = True
    ) -> None:
        """A forward ran without one: record it if it is time for that.

        All ranks call it with the same keys. ``make`` gives None on a rank that is not ready; none
        records then. A recording is kept if it gives, on every rank, what the forward gave. Where
        an owner is not ``trusted`` any more, on any rank, its recordings go.
        """
        if self._make_graph is None or self.refusal is not None:
            return
        times = self._count(key)
        if self._kept and times.bit_count() == 1 and self._group.most(not trusted):
            self._drop([kept for kept in self._kept if kept[0] is key[0]])
        # At the first time that counts, and with twice the patience each time that it failed.
        if times % _FIRST or (times // _FIRST).bit_count() != 1:
            return
        offered = make()
        if self._group.most(offered is None) or offered is None:
            return
        if self._reservation.has_room(2 * offered.nbytes):  # for others' forwards as well
            self._record(key, self._make_graph(), offered)

    def forget(self) -> None:
        """Free them all, and begin anew."""
        self._seen.clear()
        self._drop(list(self._kept))

    def number(self, owner: object) -> int:
        """Of recordings that are somebody's."""
        return sum(key[0] is owner for key in self._kept)

    def _count(self, key: Key) -> int:
        times = self._seen.pop(key, 0) + 1
        self._seen[key] = times
        while len(self._seen) > _MOST_COUNTED:
            self._seen.popitem(last=False)
        return times

    def _record(self, key: Key, graph: Graph, offered: Recordable) -> None:
        recorded, reason = None, ""
        self._reservation.trim()  # a graph has memory of its own, not what is cached
        try:
            recorded = RecordedForward(
                graph, offered.inputs, offered.rotations, offered.compute, offered.read
            )
        except torch.OutOfMemoryError:
            pass  # another time
        except Exception as error:  # noqa: BLE001  of CUDA, or of what is recorded
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if self._group.most(bool(reason)):
            self._refuse(reason or "another rank could not record a forward")
        elif not self._group.most(recorded is None) and recorded is not None:
            output = recorded.replay(offered.inputs)
            self._group.most(0)  # the collective with a deadline
            if self._group.most(not _same_bits(output, offered.output)):
                self._refuse("a recorded forward gave something else than the forward itself")
                return
            self._reservation.withhold(recorded.nbytes)
            self._kept[key] = recorded
            self._drop(list(self._kept)[:-_MOST])

    def _refuse(self, reason: str) -> None:
        self.refusal = reason[:_LONGEST_REASON]
        self.forget()

    def _drop(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._reservation.withhold(-self._kept[key].nbytes)
            if self._group.device.type == "cuda":
                torch.cuda.synchronize()  # it may still run
            del self._kept[key]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
