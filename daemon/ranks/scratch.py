"""Scratch regions of clients' sessions, as this rank has them mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ...protocol import limits
from ...protocol import messages as m
from ...protocol.errors import BadJob, Internal
from ...protocol.manifest import round_up
from ...protocol.tensors import describe_tensor, view_placed

_Key = tuple[str, int]  # session, number


class MappedScratches:
    """Their owners may write to them at any time: what is read is copied, once, and looked at then.

    A region's size never changes, so that touching it cannot end the process.
    """

    def __init__(self) -> None:
        self._maps: dict[_Key, mmap.mmap] = {}

    def open(self, grant: m.ScratchGrant, descriptor: int) -> None:
        """Map a region. Takes over ``descriptor``. Raises BadJob."""
        try:
            self._maps[grant.session, grant.number] = mmap.mmap(descriptor, grant.nbytes)
        except (OSError, ValueError) as error:
            raise BadJob(f"a scratch region cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)

    def forget(self, key: _Key) -> None:
        """Unmap one, if it is mapped."""
        self._maps.pop(key, None)

    def forget_session(self, session: str) -> None:
        """Unmap all of a session."""
        for key in [key for key in self._maps if key[0] == session]:
            del self._maps[key]

    def read(
        self, session: str, number: int | None, part: m.TensorPart, device: torch.device
    ) -> Tensor:
        """A copy, on ``device``, of a tensor that lies in a region."""
        return view_placed(self._find(session, number), part).to(device, copy=True)

    def write(
        self, session: str, job: m.Job, tensors: Mapping[str, Tensor]
    ) -> list[m.TensorPart] | None:
        """Leave a job's outputs behind its inputs; None if there is too little room."""
        region = self._find(session, m.scratch_of(job))
        parts: list[m.TensorPart] = []
        inputs = (p.offset + p.nbytes for p in job.tensors if p.offset is not None)
        end = max(inputs, default=0)
        for name, tensor in tensors.items():
            offset = round_up(end, limits.SCRATCH_ALIGNMENT)
            end = offset + tensor.nbytes
            if end > len(region):
                return None
            parts.append(describe_tensor(name, tensor, inline=False, offset=offset))
        for part, tensor in zip(parts, tensors.values(), strict=True):
            view_placed(region, part).copy_(tensor)
        return parts

    def _find(self, session: str, number: int | None) -> mmap.mmap:
        region = None if number is None else self._maps.get((session, number))
        if region is None:
            raise Internal(f"scratch region {number} of a session is not mapped")
        return region
