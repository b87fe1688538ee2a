"""Exchanges as operators, which compilers leave as they are.

What travels between ranks then stays out of compiled code: a rank may have the code that it is to
run checked all by itself, with a `LocalExchange` in the place of the real one. Tokens come and go
packed for Ulysses, so that compiled code writes them in that order at once; where the exchange is
by heads, each travels while the next is computed.

A compiler is free to change the order of operators that need nothing of each other, to compute
something once for each that reads it, and to write over what nobody reads any more. So

- each is given what was sent before it: ranks must send in the same order,
- attention is given what may still be on its way, and sending is said to change what it sends: the
  sender's memory is then the only one that can be given on,
- sending is said to change what the next is computed of, too: it is then sent before that. Nothing
  is changed in truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..operators import define_operator
from .attention import Exchange, LocalExchange
from .ulysses import Make, Sent, begin_by_heads, pack, unpack, unpack_copy


@dataclass
class Use:
    """Of an exchange: how often it was asked so far, and where what is on its way comes from."""

    exchange: Exchange
    count: int = 0
    _sources: dict[int, int] = field(default_factory=dict)  # addresses, by those of what comes

    def note(self, packed: Tensor, received: Tensor) -> Tensor:
        """Remember that one is being sent to the other, and return that."""
        self._sources[received.data_ptr()] = packed.data_ptr()
        return received

    def check(self, sent: Sent) -> Sent:
        """Raise RuntimeError if what is sent may have been given up before it had arrived."""
        if self._sources.pop(sent.received.data_ptr(), None) != sent.packed.data_ptr():
            raise RuntimeError("compiled code gave up what it sends before it has arrived")
        return sent


_current = [Use(LocalExchange())]  # the last one; ranks compute in one thread


@dataclass(frozen=True)
class OpaqueExchange(Exchange):
    """That of :func:`exchanging`; outside of it the rank's own tokens attend to each other.

    ``ways``: how many ranks share the heads; any number that divides them is right.
    """

    ways: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`."""
        begun = self.begin(partial(pack, query), partial(pack, key), partial(pack, value), (query,))
        return self.finish(begun).view(query.shape)

    def begin(self, query: Make, key: Make, value: Make, of: Sequence[Tensor]) -> Tensor:
        """See `Exchange.begin`."""
        return begin_by_heads(_OPERATORS, self.ways, query, key, value, of)

    def finish(self, begun: Tensor, after: Tensor | None = None, room: int = 0) -> Tensor:
        """See `Exchange.finish`."""
        return _OPERATORS.receive(begun, after, room)


class _Operators:
    """`HeadSteps`, each an operator."""

    def send(self, packed: Tensor, after: Sent | None, before: Sequence[Tensor]) -> Sent:
        sent = None if after is None else after.received
        first, *second = before
        received = torch.ops.xdit_sidecar.exchange_send(packed, sent, first, *second)
        return Sent(packed, received)

    def attend(self, query: Sent, key: Sent, value: Sent) -> Tensor:
        output: Tensor = torch.ops.xdit_sidecar.exchange_attend(*query, *key, *value)
        return output

    def receive(self, output: Tensor, after: Tensor | None, room: int) -> Tensor:
        received: Tensor = torch.ops.xdit_sidecar.exchange_receive(output, after, room)
        return received


_OPERATORS = _Operators()


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[Use]:
    """What an `OpaqueExchange` does meanwhile."""
    use = Use(exchange)
    _current.append(use)
    try:
        yield use
    finally:
        _current.pop()


def _send(packed: Tensor, *order: Tensor | None) -> Tensor:
    use = _current[-1]
    by_heads = use.exchange.by_heads
    if by_heads is None:
        return use.note(packed, torch.empty_like(packed))  # nothing travels, and nothing reads it
    use.count += 1
    return use.note(*by_heads.send(packed))


def _attend(*tensors: Tensor) -> Tensor:
    use = _current[-1]
    use.count += 1
    query, key, value = (use.check(Sent(*tensors[at : at + 2])) for at in (0, 2, 4))
    if (by_heads := use.exchange.by_heads) is not None:
        return by_heads.attend(query, key, value)
    output = use.exchange.attend(*(unpack(sent.packed) for sent in (query, key, value)))
    return pack(output, query.packed.shape[0])


def _receive(output: Tensor, after: Tensor | None, room: int) -> Tensor:
    by_heads = _current[-1].exchange.by_heads
    if by_heads is None:
        return unpack_copy(output, room)
    return by_heads.receive(output, room=room)


def _describe_received(output: Tensor, after: Tensor | None, room: int) -> Tensor:
    ways, batch, count, heads, size = output.shape
    return output.new_empty([batch, count, ways * heads * size + room])


_SENT = "Tensor {0}_packed, Tensor {0}_received"
define_operator(
    "exchange_send(Tensor(a!) packed, Tensor? sent, Tensor(b!) next, Tensor(c!)? other=None)"
    " -> Tensor",
    _send,
    lambda packed, *order: packed.new_empty(packed.shape),
)
define_operator(
    f"exchange_attend({', '.join(_SENT.format(name) for name in ('q', 'k', 'v'))}) -> Tensor",
    _attend,
    lambda packed, *others: packed.new_empty(packed.shape),
)
define_operator(
    "exchange_receive(Tensor output, Tensor? after, int room) -> Tensor",
    _receive,
    _describe_received,
)
