"""Whether what came with a job is what the job says of its tensors. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

from ...protocol import limits
from ...protocol import messages as m
from ...protocol.errors import BadMessage
from .jobs import Frame


def check_tensors(
    parts: Sequence[m.TensorPart], frames: Sequence[Frame], scratch: int | None
) -> None:
    """Raise BadMessage unless every tensor has its bytes.

    Inline ones have frames of exactly their size; one with an offset lies within the ``scratch``
    bytes of the job's scratch region.
    """
    if len({part.name for part in parts}) != len(parts):
        raise BadMessage("two tensors of this job have the same name")
    _check_frames([part for part in parts if part.inline], frames)
    for part in parts:
        if part.offset is not None:
            _check_place(part, scratch)
        elif not part.inline and part.digest is None:
            raise BadMessage(f"tensor {part.name!r} has neither bytes nor a digest")
    if sum(part.nbytes for part in parts) > limits.KEPT_BYTES:
        raise BadMessage(f"the tensors of one job exceed {limits.KEPT_BYTES} bytes")


def _check_frames(inline: Sequence[m.TensorPart], frames: Sequence[Frame]) -> None:
    expected = sum(part.frames for part in inline)
    if expected != len(frames):
        raise BadMessage(f"the tensors of this job fill {expected} frames, {len(frames)} came")
    arriving = iter(frames)
    for part in inline:
        nbytes = sum(map(len, itertools.islice(arriving, part.frames)))
        if nbytes != part.nbytes:
            raise BadMessage(
                f"tensor {part.name!r} has {part.nbytes} bytes by its shape, its frames {nbytes}"
            )


def _check_place(part: m.TensorPart, scratch: int | None) -> None:
    if part.name != m.IN_SCRATCH or part.dtype not in get_args(m.ComputeDtype):
        raise BadMessage(f"tensor {part.name!r} ({part.dtype}) may not lie in a scratch region")
    if part.inline or part.digest is not None:
        raise BadMessage(f"tensor {part.name!r} says twice where its bytes are")
    if scratch is None:
        raise BadMessage(f"tensor {part.name!r} lies in a scratch region, this job names none")
    offset = part.offset or 0
    if offset % limits.SCRATCH_ALIGNMENT or offset + part.nbytes > scratch:
        raise BadMessage(
            f"tensor {part.name!r} of {part.nbytes} bytes does not lie at {offset} of a scratch "
            f"region of {scratch} bytes, at a multiple of {limits.SCRATCH_ALIGNMENT}"
        )
