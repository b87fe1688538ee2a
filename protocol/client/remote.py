"""Work for the daemon's ranks: forwards, pictures, decoding and encoding."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import msgspec

from .. import messages as m
from ..errors import NO_RANKS, BadMessage, RanksUnavailable
from ..tensors import Buffer, describe_tensor, pack_tensor, unpack_tensors
from .client import Client
from .deadline import Deadline, ShouldCancel
from .exchange import raise_refusal
from .kept import SentTensors
from .scratch import Scratch, room_for

if TYPE_CHECKING:
    import torch

    from .session import ClientSession

OnStep = Callable[[int, int, "torch.Tensor | None"], None]
Tensors = Mapping[str, "torch.Tensor"]

#: Tensors that come again and again, named by their digest after the first time.
CONDITIONING = frozenset(
    ("context", "y", "negative_context", "negative_y", *(f"ref_latents.{n}" for n in range(10)))
)
_TRIES = 3  # a digest may be forgotten between two tries when many clients work at once


class RemoteRanks:
    """The ranks of a client's daemon. Blocking and thread-safe, like the client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sent = SentTensors()
        self._lock = threading.Lock()  # of what was sent

    def run(
        self,
        job: m.Job,
        tensors: Tensors,
        *,
        timeout: float = 120.0,
        should_cancel: ShouldCancel | None = None,
        on_step: OnStep | None = None,
        keep: Collection[str] = CONDITIONING,
    ) -> dict[str, torch.Tensor]:
        """Do a job; its outputs by name, in host memory.

        ``job.tensors`` is made from ``tensors`` (any device). ``timeout`` (seconds) counts from the
        last sign of life: a picture may take longer as long as its steps come. ``on_step`` is
        called with steps done, steps in all and perhaps a preview: (h, w, 3), U8, or without a VAE
        (C, h, w), F32, the transformer's latent. Giving up frees the caller at once; the ranks stop
        at the next step.

        Raises SidecarError: RankLost (retryable) when the ranks died over it, MissingComponent,
        OutOfMemory, BadJob, RanksUnavailable, Cancelled, DeadlineExceeded…
        """
        for _ in range(_TRIES):
            answer, outputs = self._try(job, tensors, timeout, should_cancel, on_step, keep)
            if not isinstance(answer, m.Need):
                return outputs
            with self._lock:
                self._sent.lost(answer.digests)
        raise BadMessage("the daemon forgot tensors as soon as they were sent: send less at once")

    def wait_until_ready(self, *, timeout: float = 180.0) -> None:
        """Return when the ranks can work. Raises RanksUnavailable or DeadlineExceeded."""
        deadline = Deadline(timeout)
        while (group := self._client.status().group) is not None and group.state != "ready":
            if group.state == "degraded":
                raise RanksUnavailable(f"the ranks were given up: {group.error}")
            time.sleep(min(0.05, deadline.next_wait("waiting for the ranks")))
        if group is None:
            raise RanksUnavailable(NO_RANKS)

    def _try(
        self,
        job: m.Job,
        tensors: Tensors,
        timeout: float,
        should_cancel: ShouldCancel | None,
        on_step: OnStep | None,
        keep: Collection[str],
    ) -> tuple[m.AnswerBody, dict[str, torch.Tensor]]:
        deadline = Deadline(timeout, should_cancel)
        session = self._client.session(deadline)
        exchanges = self._client.exchanges

        def open_scratch(body: m.OpenScratch) -> int:
            opened = exchanges.ask(session, body, m.ScratchOpened, deadline)
            return session.take_descriptor(opened.descriptor, deadline)

        with session.scratches.lend(room_for(job, tensors), open_scratch) as scratch:
            body, frames = self._pack(session, job, tensors, keep, scratch)
            with exchanges.open(session, body, deadline, frames) as request:
                answer, back = request.receive()
                while isinstance(answer, m.Step):
                    deadline.restart()
                    if on_step is not None:
                        preview = unpack_tensors(answer.tensors, back).get("preview")
                        on_step(answer.step, answer.steps, preview)
                    answer, back = request.receive()
            raise_refusal(session, answer)
            if isinstance(answer, m.Output):
                with self._lock:
                    self._sent.enter(session)
                    for part in body.tensors:
                        if part.digest is not None:
                            self._sent.sent(part.digest)
                memory = None if scratch is None else scratch.memory
                return answer, unpack_tensors(answer.tensors, back, memory)
            if not isinstance(answer, m.Need):
                raise BadMessage(f"the daemon answered with a {type(answer).__name__}")
            return answer, {}

    def _pack(
        self,
        session: ClientSession,
        job: m.Job,
        tensors: Tensors,
        keep: Collection[str],
        scratch: Scratch | None,
    ) -> tuple[m.Job, list[Buffer]]:
        """The job with its tensors described, and their frames."""
        parts: list[m.TensorPart] = []
        frames: list[Buffer] = []
        with self._lock:
            self._sent.enter(session)
            for name, tensor in tensors.items():
                digest = self._sent.name(tensor) if name in keep else None
                if scratch is not None and name == m.IN_SCRATCH:
                    parts.append(scratch.place(name, tensor))
                elif digest is not None and self._sent.was_sent(digest):
                    parts.append(describe_tensor(name, tensor, digest, inline=False))
                else:
                    part, data = pack_tensor(name, tensor, digest)
                    parts.append(part)
                    frames += data
        body = msgspec.structs.replace(job, tensors=parts)
        if scratch is not None and isinstance(body, m.Forward):
            body = msgspec.structs.replace(body, scratch=scratch.number)
        return body, frames
