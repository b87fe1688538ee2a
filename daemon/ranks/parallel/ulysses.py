"""Attention of which each rank computes some heads, over the tokens of all ranks.

DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509) where every rank has as many tokens. Other than
xfuser's USP it exchanges each tensor by itself, while the next one is computed, and in a form whose
ends compiled code can write and read. B rows, S tokens of a rank, H heads of size D, P ranks;
h = H / P. A tensor is *packed* as (P, B, S, h, D): by the rank that computes the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[[int], Tensor]  # packed, for as many ranks


def pack(tokens: Tensor, ways: int) -> Tensor:
    """(B, S, H, D) → (P, B, S, h, D)."""
    batch, count, heads, size = tokens.shape
    by_rank = tokens.reshape(batch, count, ways, heads // ways, size)
    return by_rank.permute(2, 0, 1, 3, 4).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """(P, B, S, h, D) → (B, S, H, D)."""
    return packed.permute(1, 2, 0, 3, 4).flatten(2, 3)


def unpack_copy(packed: Tensor, room: int = 0) -> Tensor:
    """(P, B, S, h, D) → (B, S, H·D + room), in memory of its own; the last columns are not set."""
    ways, batch, count, heads, size = packed.shape
    width = ways * heads * size
    tokens = packed.new_empty(batch, count, width + room)
    target = tokens[..., :width].view(batch, count, ways, heads, size)
    # Fewer and longer pieces, which a GPU copies faster.
    if all(columns * packed.element_size() % 8 == 0 for columns in (size, room)):
        packed, target = packed.view(torch.int64), target.view(torch.int64)
    target.copy_(packed.permute(1, 2, 0, 3, 4))
    return tokens


class Sent(NamedTuple):
    """A query, key or value on its way: ``packed`` by the rank that has the tokens, and there."""

    packed: Tensor  # as it was sent; it may still be read
    received: Tensor  # (P, B, S, h, D), from each rank its tokens; it may not be complete yet


class HeadSteps(Protocol):
    """The exchanges of a block. All ranks make the same calls in the same order."""

    def send(self, packed: Tensor, after: Sent | None, before: Sequence[Tensor]) -> Sent:
        """Send a packed query, key or value, ``after`` another one.

        And ``before`` anything else is computed of these: one or two tensors.
        """
        ...

    def attend(self, query: Sent, key: Sent, value: Sent) -> Tensor:
        """Attend, and send the output to whose tokens it is of: packed, it may not be there yet."""
        ...

    def receive(self, output: Tensor, after: Tensor | None, room: int) -> Tensor:
        """(B, S, H·D + room) of what :meth:`attend` gave, of the rank's own tokens.

        Waited for ``after`` that is computed. The last columns are not set.
        """
        ...


def begin_by_heads(
    steps: HeadSteps, ways: int, query: Make, key: Make, value: Make, of: Sequence[Tensor]
) -> Tensor:
    """What `HeadSteps.receive` takes; each tensor travels while the next is made.

    ``of``: what they are made of. The value goes first: once it is projected it is ready.
    """
    value_sent = steps.send(value(ways), None, of)
    key_sent = steps.send(key(ways), value_sent, of)
    query_sent = steps.send(query(ways), key_sent, of)
    return steps.attend(query_sent, key_sent, value_sent)


class HeadExchange:
    """The `HeadSteps` of one forward over ``group``.

    Raises RuntimeError if a rank stays away past the group's deadline.
    """

    def __init__(self, group: Any, attend: Attend) -> None:
        """``attend`` is given, and gives, (B, P·S, h, D)."""
        self._group = group
        self._attend = attend
        self._under_way: list[tuple[Any, Tensor]] = []

    def send(
        self, packed: Tensor, after: Sent | None = None, before: Sequence[Tensor] = ()
    ) -> Sent:
        """See `HeadSteps.send`."""
        return Sent(packed, self._send(packed))

    def attend(self, query: Sent, key: Sent, value: Sent) -> Tensor:
        """See `HeadSteps.attend`."""
        self.join()
        ways, batch, count, heads, size = query.received.shape
        tensors = (
            self._arrived(sent.received).transpose(0, 1).reshape(batch, ways * count, heads, size)
            for sent in (query, key, value)
        )
        output = self._attend(*tensors).reshape(batch, ways, count, heads, size)
        return self._send(output.transpose(0, 1).contiguous())

    def receive(self, output: Tensor, after: Tensor | None = None, room: int = 0) -> Tensor:
        """See `HeadSteps.receive`.

        In memory of its own: compiled code that reads what is packed is ten times as slow.
        """
        self.join()
        return unpack_copy(self._arrived(output), room)

    def join(self) -> None:
        """Have what the device does next wait for what is under way."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def give_up(self) -> None:
        """Join what is under way of a forward that failed while it was recorded."""
        self.join()

    def _send(self, packed: Tensor) -> Tensor:
        received = torch.empty_like(packed)
        work = dist.all_to_all_single(received, packed, group=self._group, async_op=True)
        self._under_way.append((work, packed))
        return received

    def _arrived(self, received: Tensor) -> Tensor:
        """What has come, of what :meth:`_send` gave."""
        return received


def exchange_shares(shares: Tensor, group: Any) -> Tensor:
    """(P, …): each rank is given one of the first dimension; from each comes one."""
    received = torch.empty_like(shares)
    dist.all_to_all_single(received, shares, group=group)
    return received
