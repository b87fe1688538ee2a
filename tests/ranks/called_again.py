"""What stands for a CUDA graph on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CalledAgain:
    """A `Graph` that does its work by calling it again; recording gives no result, as on a GPU."""

    nbytes = 1000

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        self._work = work
        self._result = torch.full_like(work(), torch.nan)
        return self._result

    def replay(self) -> None:
        self._result.copy_(self._work())
