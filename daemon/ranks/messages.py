"""What broker, fork server and rank process say over their channels, before a rank has a session.

Internal: all always come from the same release.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ...protocol import limits
from ...protocol.messages import Compile

_Pid = Annotated[int, Meta(gt=0)]
_Reason = Annotated[str, Meta(max_length=limits.TEXT)]


class Fork(msgspec.Struct, frozen=True, tag="fork", tag_field="type", forbid_unknown_fields=True):
    """To the fork server: fork a rank's process, whose channel is the descriptor sent along."""


class Imported(msgspec.Struct, frozen=True, tag="imported", tag_field="type"):
    """From the fork server: it has imported what ranks need. The rest of a start takes no time."""


class Forked(msgspec.Struct, frozen=True, tag="forked", tag_field="type"):
    """The answer to the oldest order: the process is there."""

    pid: _Pid


class NotForked(msgspec.Struct, frozen=True, tag="not-forked", tag_field="type"):
    """The answer to the oldest order: there will be none."""

    reason: _Reason


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="type"):
    """A forked process is reaped; the status is negative for a signal."""

    pid: _Pid
    status: int


class Refused(msgspec.Struct, frozen=True, tag="refused", tag_field="type"):
    """From fork server or rank: why the process ends before it has begun to work."""

    reason: _Reason


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a rank's process: which rank it is. ``device`` is "cpu" or a GPU's UUID.

    ``reserve`` and ``neighbours``: see :class:`.reservation.Reservation`.
    """

    rank: Annotated[int, Meta(ge=0, lt=limits.RANKS)]
    device: Annotated[str, Meta(min_length=1, max_length=limits.NAME)]
    reserve: Annotated[int, Meta(ge=0)]
    neighbours: Annotated[int, Meta(ge=1, le=limits.RANKS)]
    compiles: Compile = "auto"  # transformers; "auto": on a GPU


ServerWord = Imported | Forked | NotForked | Ended | Refused  # from the fork server
