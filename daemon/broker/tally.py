"""What was asked and how it ended: counted for the metrics, told to the log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from ...protocol import messages as m
from .events import Asker
from .log import log

_JOBS = (m.Forward, m.Generate, m.Decode, m.Encode, m.EncodeText)
_TOLD = (m.Generate, m.Decode, m.Encode, m.EncodeText)  # forwards are too many
_CANCELLED = "cancelled"
_DONE = "ok"
_NEED = "need"  # tensors were named that the ranks do not have: asked again with their bytes


@dataclass(slots=True)
class Ended:
    """Requests of one kind that ended in one way."""

    count: int = 0
    seconds: float = 0.0  # from their arrival to their answer, of all together


class _Open(NamedTuple):
    body: m.RequestBody | m.BulkBody
    pid: int
    since: float


class Tally:
    """``ended``: (kind of request, how it ended) → how many, how long.

    It ended "ok", "need", "cancelled" or with an error's code: closed sets, which peers cannot
    make grow.
    """

    def __init__(self) -> None:
        self.ended: dict[tuple[str, str], Ended] = {}
        self._open: dict[Asker, _Open] = {}

    def begin(self, asker: Asker, body: m.RequestBody | m.BulkBody, pid: int) -> None:
        """A request arrived. Those of ranks, who wait for work, are not counted."""
        if not isinstance(body, m.NextTask):
            self._open[asker] = _Open(body, pid, time.monotonic())

    def answered(self, asker: Asker, answer: m.AnswerBody) -> None:
        """The answer goes out."""
        match answer:
            case m.Failed(code=code):
                self._end(asker, code)
            case m.Need():
                self._end(asker, _NEED)
            case _:
                self._end(asker, _DONE)

    def given_up(self, asker: Asker) -> None:
        """Nobody waits for the answer any more."""
        self._end(asker, _CANCELLED)

    def _end(self, asker: Asker, outcome: str) -> None:
        request = self._open.pop(asker, None)
        if request is None:
            return
        seconds = time.monotonic() - request.since
        kind = kind_of(request.body)
        ended = self.ended.setdefault((kind, outcome), Ended())
        ended.count += 1
        ended.seconds += seconds
        failed = outcome not in (_DONE, _NEED, _CANCELLED)
        log(
            "request-ended",
            "warning"
            if failed and isinstance(request.body, _JOBS)
            else "info"
            if isinstance(request.body, _TOLD)
            else "debug",
            session=asker.session,
            request=asker.request,
            pid=request.pid,
            kind=kind,
            outcome=outcome,
            seconds=seconds,
        )


def kind_of(body: m.RequestBody | m.BulkBody) -> str:
    """The name of a request's type, as it travels."""
    return str(type(body).__struct_config__.tag)
