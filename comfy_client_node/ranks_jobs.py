"""Jobs for the daemon's ranks, tried once more when it is known that this helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from ..protocol import messages as m
from ..protocol.client.remote import OnStep
from ..protocol.errors import MissingComponent, RankLost, SidecarError
from .link import Link, explain, stop_if_interrupted

_log = logging.getLogger("xdit_sidecar.comfyui")

_SECONDS = 600.0  # from one sign of life to the next
_RECOVERY_SECONDS = 120.0
COMPUTE: dict[torch.dtype, m.ComputeDtype] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class RanksFailed(RuntimeError):
    """The daemon did not do a job. Its text is for people at the node."""


def run_on_ranks(
    link: Link,
    make_job: Callable[[], m.Job],
    tensors: Mapping[str, torch.Tensor],
    renew: Callable[[], object],
    *,
    on_step: OnStep | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of a job; it is tried once more if the ranks, or the daemon, were started anew.

    ``renew`` has the job's components resident again, where the ranks miss one. ``make_job`` is
    called for each try. Raises RanksFailed.
    """
    recovered: set[str] = set()
    while True:
        try:
            return link.remote.run(
                make_job(),
                tensors,
                timeout=_SECONDS,
                should_cancel=stop_if_interrupted,
                on_step=on_step,
            )
        except SidecarError as error:
            if not isinstance(error, MissingComponent | RankLost) or error.code in recovered:
                raise RanksFailed(explain(error)) from None
            recovered.add(error.code)
            _log.warning("xDiT: %s; trying once more", error)
            failure = _recover(link, error, renew)
        if failure is not None:
            raise RanksFailed(failure)


def _recover(link: Link, error: SidecarError, renew: Callable[[], object]) -> str | None:
    """Have what ``error`` was about in place again; why that cannot be, if so."""
    try:
        if isinstance(error, RankLost):
            link.remote.wait_until_ready(timeout=_RECOVERY_SECONDS)
        else:
            renew()
    except SidecarError as failure:
        return explain(failure)
    return None
