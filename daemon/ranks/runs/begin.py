"""Which run a job becomes."""

from __future__ import annotations

from ....protocol import messages as m
from .base import Engines, Place, Run, Tensors
from .coding import DecodeRun, EncodeRun, EncodeTextRun
from .forward import ForwardRun
from .picture import PictureRun


def begin_run(task: m.TurnTask, job: m.Job, tensors: Tensors, engines: Engines) -> Run:
    """The run of a job on this rank. Raises ValueError for tensors that are missing."""
    place = Place(task.job, task.session, task.regions, job.components)
    match job:
        case m.Forward():
            return ForwardRun(job, tensors, place, engines)
        case m.Generate():
            return PictureRun(job, tensors, place, engines)
        case m.Decode():
            return DecodeRun(job, tensors, place, engines)
        case m.Encode():
            return EncodeRun(job, tensors, place, engines)
        case m.EncodeText():
            return EncodeTextRun(job, tensors, place, engines)
