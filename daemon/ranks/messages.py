"""What broker and rank process say over their channel, before the rank has a session.

Internal: both always come from the same release.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ...protocol import limits
from ...protocol.messages import Compile


class Imported(msgspec.Struct, frozen=True, tag="imported", tag_field="type"):
    """The process has imported what a rank needs. The rest of its start takes no time."""


class Refused(msgspec.Struct, frozen=True, tag="refused", tag_field="type"):
    """Why the process ends before it has begun to work."""

    reason: Annotated[str, Meta(max_length=limits.TEXT)]


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which rank the process is to be. ``device`` is "cpu" or a GPU's UUID.

    ``reserve`` and ``neighbours``: see :class:`.reservation.Reservation`.
    """

    rank: Annotated[int, Meta(ge=0, lt=limits.RANKS)]
    device: Annotated[str, Meta(min_length=1, max_length=limits.NAME)]
    reserve: Annotated[int, Meta(ge=0)]
    neighbours: Annotated[int, Meta(ge=1, le=limits.RANKS)]
    compiles: Compile = "auto"  # transformers; "auto": on a GPU


RankWord = Imported | Refused  # from the rank; an Assignment is all that it is told
