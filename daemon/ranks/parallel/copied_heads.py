"""Heads exchanged by the copy engines of GPUs, through memory that ranks share.

NCCL exchanges by kernels, which take processors from what is computed meanwhile; copy engines take
none.

One place for each of the four tensors of a block is enough, and nobody has to be told that it is
free: a rank sends a block's query, key or value only after it has, of everybody, the output of the
block before, which they sent when they had attended; and an output only after it has the query, key
and value of everybody, which are computed from what was received of the output before.

A stream waits for a flag without a deadline. A collective that has one must follow before a rank
waits for what is computed: at the end of each forward its tokens are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shared_places import PLACES, SharedPlaces
from .ulysses import Attend, HeadExchange


class CopiedHeads(HeadExchange):
    """A `HeadExchange` over `SharedPlaces`; all ranks' packed tensors have as many bytes.

    What :meth:`send` and :meth:`attend` give for what is on its way only stands for it, as
    compilers may write over memory that they were given. So it costs memory that nobody touches.
    """

    def __init__(self, places: SharedPlaces, attend: Attend) -> None:
        super().__init__(None, attend)
        self._places = places
        self._count = 0
        self._sent: dict[int, Tensor] = {}  # by place
        self._coming: dict[int, Tensor] = {}  # by the address of what stands for it

    @property
    def unfinished(self) -> bool:
        """Whether something was sent that was not received."""
        return bool(self._count % PLACES or self._sent or self._coming)

    def join(self) -> None:
        """See `HeadExchange.join`."""
        self._places.receive(list(self._sent))
        self._sent.clear()

    def give_up(self) -> None:
        """See `HeadExchange.give_up`."""
        self._places.receive([])
        self._count = 0
        self._sent.clear()
        self._coming.clear()

    def _send(self, packed: Tensor) -> Tensor:
        number = self._count % PLACES
        self._count += 1
        standing = torch.empty_like(packed)
        self._coming[standing.data_ptr()] = self._places.send(number, packed)
        self._sent[number] = packed
        return standing

    def _arrived(self, received: Tensor) -> Tensor:
        return self._coming.pop(received.data_ptr())
