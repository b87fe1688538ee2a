"""An exchange as one operator, which compilers leave as it is.

What travels between ranks then stays out of compiled code: a rank may have the code that it is to
run checked all by itself, with a `LocalExchange` in the place of the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Exchange, LocalExchange

_NAME = "xdit_sidecar::exchange_attend"
_current: list[Exchange] = [LocalExchange()]  # the last one; ranks compute in one thread


@dataclass(frozen=True)
class OpaqueExchange:
    """That of :func:`exchanging`; outside of it the rank's own tokens attend to each other."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Exchange.attend`; contiguous."""
        output: Tensor = torch.ops.xdit_sidecar.exchange_attend(query, key, value)
        return output


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
    """What an `OpaqueExchange` does meanwhile."""
    _current.append(exchange)
    try:
        yield
    finally:
        _current.pop()


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _current[-1].attend(query, key, value).contiguous()


def _describe(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_library: Any = torch.library
_library.define(_NAME, "(Tensor query, Tensor key, Tensor value) -> Tensor")
_library.impl(_NAME, "CompositeExplicitAutograd", _attend)
_library.register_fake(_NAME, _describe)
