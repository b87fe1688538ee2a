"""An exchange as one operator, which compilers leave as it is.

What travels between ranks then stays out of compiled code: a rank may have the code that it is to
run checked all by itself, with a `LocalExchange` in the place of the real one. Tokens come and go
packed for Ulysses, so that compiled code writes and reads them in that order at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Exchange, LocalExchange, SequenceExchange
from .ulysses import pack, pack_output, unpack, unpack_output

_NAME = "xdit_sidecar::exchange_attend"


@dataclass
class Use:
    """Of an exchange: how often it was asked so far."""

    exchange: Exchange
    count: int = 0


_current = [Use(LocalExchange())]  # the last one; ranks compute in one thread


@dataclass(frozen=True)
class OpaqueExchange:
    """That of :func:`exchanging`; outside of it the rank's own tokens attend to each other.

    ``ways``: how many ranks share the heads; any number that divides them is right.
    """

    ways: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`."""
        packed = pack(query, key, value, self.ways)
        return unpack_output(torch.ops.xdit_sidecar.exchange_attend(packed))


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[Use]:
    """What an `OpaqueExchange` does meanwhile."""
    use = Use(exchange)
    _current.append(use)
    try:
        yield use
    finally:
        _current.pop()


def _attend(packed: Tensor) -> Tensor:
    use, ways = _current[-1], packed.shape[0]
    use.count += 1
    exchange = use.exchange
    if isinstance(exchange, SequenceExchange) and exchange.by_heads:
        return exchange.attend_packed(packed)
    return pack_output(exchange.attend(*unpack(packed)), ways)


def _describe(packed: Tensor) -> Tensor:
    ways, _, *rest = packed.shape
    return packed.new_empty([ways, *rest])


_library: Any = torch.library
_library.define(_NAME, "(Tensor packed) -> Tensor")
_library.impl(_NAME, "CompositeExplicitAutograd", _attend)
_library.register_fake(_NAME, _describe)
