"""What a fill takes from a file or from host memory: parts, and the batches in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class FilePart(NamedTuple):
    """``length`` bytes at ``position`` belong into the region at ``offset``.

    A position in a file, or an address in host memory.
    """

    position: int
    offset: int
    length: int


Batch = list[FilePart]
Source = Callable[[int, memoryview], None]
"""Fills a target with what is at a position: a file, or host memory. Called by several threads."""
OnBytes = Callable[[int], None]
"""Told in the caller's thread how many bytes more are in the region, and about 20 times a second 0
when there are none. What it raises ends the reading and passes through."""


def unheard(_nbytes: int) -> None:
    """The OnBytes of those who do not want to know."""


def total_bytes(parts: Iterable[FilePart]) -> int:
    """Bytes of all parts together."""
    return sum(part.length for part in parts)


def plan_batches(parts: Iterable[FilePart], most: int) -> Iterator[Batch]:
    """The same bytes in the same order, in batches of at most ``most`` bytes.

    Parts that follow each other in file and region become one, long ones are cut, empty ones left
    out: a model has hundreds of small tensors, and each read and copy costs a call.
    """
    batch: Batch = []
    room = most
    for part in _join(parts):
        done = 0
        while done < part.length:
            length = min(room, part.length - done)
            batch.append(FilePart(part.position + done, part.offset + done, length))
            done += length
            room -= length
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def _join(parts: Iterable[FilePart]) -> Iterator[FilePart]:
    last: FilePart | None = None
    for part in parts:
        if last is None or not last.length:
            last = part
        elif (part.position, part.offset) == (
            last.position + last.length,
            last.offset + last.length,
        ):
            last = last._replace(length=last.length + part.length)
        elif part.length:
            yield last
            last = part
    if last is not None:
        yield last
