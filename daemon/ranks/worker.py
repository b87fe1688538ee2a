"""What a rank does with its tasks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...protocol import messages as m
from ...protocol.errors import (
    BadJob,
    Internal,
    MissingComponent,
    OutOfMemory,
    RankFault,
    SidecarError,
)
from ...protocol.regions.cuda_driver import CudaDriver, CudaError
from ...protocol.tensors import pack_tensor, unpack_tensor
from .autoencoder import Autoencoder
from .code_cache import prepare_code_cache
from .components import OpenComponents
from .denoiser import Denoiser
from .outputs import check_output
from .parallel import process_group
from .parallel.config import ConfigError
from .parallel.process_group import RankGroup
from .parallel.xfuser_repairs import load_xfuser
from .probe import perform_probe
from .reservation import Reservation
from .runs.base import Engines, Progress, Run
from .runs.begin import begin_run
from .scratch import MappedScratches
from .text_encoding import TextEncoding

# Imports take long on a loaded machine, and not equally long; the broker's patience is the bound.
_MEETING_SECONDS = 600.0

Frames = Sequence[memoryview]
Performed = tuple[m.Outcome, list[memoryview]]
TakeDescriptor = Callable[[int], int]


class _Begun(NamedTuple):
    """A run that waits for its next turn."""

    session: str
    run: Run


class Worker:
    """One rank of a group that has met."""

    def __init__(self, group: RankGroup, reservation: Reservation, *, compiles: bool) -> None:
        self._group = group
        self._components = OpenComponents(group.device, reservation)
        self._reservation = reservation
        self._reservation.give_up = self._give_up
        self._engines = Engines(
            group,
            self._components,
            Denoiser(
                group,
                self._components,
                self._reservation,
                compiles=compiles,
                refusal=prepare_code_cache() if compiles else None,
            ),
            Autoencoder(group, self._components, self._reservation),
            TextEncoding(self._components),
        )
        self._kept: dict[tuple[str, bytes], Tensor] = {}
        self._scratches = MappedScratches()
        self._runs: dict[int, _Begun] = {}
        self._at_work = ""  # the session whose turn it is

    @classmethod
    def meet(
        cls,
        *,
        rank: int,
        world_size: int,
        device: str,
        backend: str,
        meeting_file: Path,
        deadline: float,
        reserve: int,
        neighbours: int,
        compiles: m.Compile,
    ) -> Worker:
        """Meet the other ranks. ``device`` is "cpu" or a GPU's UUID; the engine must be loaded.

        ``reserve`` and ``neighbours``: see :class:`.reservation.Reservation`.
        """
        place = _torch_device(device)
        load_xfuser(place)  # for another kind of device than it was loaded for: an error
        group = process_group.join(
            rank=rank,
            world_size=world_size,
            device=place,
            backend=backend,
            meeting_file=meeting_file,
            deadline=deadline,
            patience=_MEETING_SECONDS,
        )
        return cls(
            group,
            Reservation(group, reserve=reserve, neighbours=neighbours),
            compiles=compiles == "on" or (compiles == "auto" and place.type == "cuda"),
        )

    @property
    def transformers(self) -> list[m.TransformerStatus]:
        """What the broker is told of with each outcome."""
        return self._engines.denoiser.transformers()

    @property
    def by_nccl(self) -> str | None:
        """Why ranks exchange by NCCL, where copy engines should."""
        return self._engines.denoiser.by_nccl

    @property
    def copied_bytes(self) -> int:
        """On this rank's device: components that lie in host memory, and weights in fp8."""
        return self._components.copied_bytes + self._engines.denoiser.copied_bytes

    def perform(self, task: m.Task, frames: Frames, take: TakeDescriptor) -> Performed:
        """Do a task; its outcome and the outcome's raw frames. Never raises.

        What is answered with RankFault may have left this rank out of step with the others.
        """
        try:
            return self._perform(task, frames, take)
        except SidecarError as error:
            return m.failed_answer(error), []
        except (ConfigError, ValueError, TypeError, IndexError) as error:
            return m.failed_answer(BadJob(str(error))), []
        except torch.OutOfMemoryError as error:
            return m.failed_answer(self._out_of_memory(error)), []
        except Exception as error:  # noqa: BLE001  the broker decides what becomes of the ranks
            text = f"rank {self._group.rank}: {type(error).__name__}: {error}"
            return m.failed_answer(RankFault(text)), []

    def _perform(self, task: m.Task, frames: Frames, take: TakeDescriptor) -> Performed:
        match task:
            case m.ProbeTask():
                return m.Probed(_probe(task, take)), []
            case m.OpenTask(regions=regions, scratch=scratch):
                if scratch is not None:
                    self._scratches.open(scratch, take(scratch.descriptor))
                for opened in regions:
                    number = opened.grant.descriptor
                    descriptor = None if number is None else take(number)
                    self._components.open(opened.grant, opened.component, descriptor)
                return m.Opened(), []
            case m.CloseTask(regions=closed):
                self._engines.denoiser.forget_regions()
                self._components.close(closed)
                return m.Opened(), []
            case m.DropTask(jobs=jobs, sessions=sessions, scratches=scratches):
                for key in scratches:
                    self._scratches.forget(key)
                for job in jobs:
                    if (begun := self._runs.pop(job, None)) is not None:
                        begun.run.end()
                for session in sessions:
                    self._forget_session(session)
            case m.CompileTask():
                self._engines.denoiser.compile_piece()
            case m.TrimTask():
                self._give_up()
                self._reservation.trim()
            case m.TurnTask():
                self._at_work = task.session
                try:
                    return self._take_turn(task, frames)
                finally:
                    self._at_work = ""
        return m.Done(), []

    def _take_turn(self, task: m.TurnTask, frames: Frames) -> Performed:
        if task.body is None:
            begun = self._runs.pop(task.job, None)
            if begun is None:
                raise Internal(f"job {task.job} is not known to rank {self._group.rank}")
            run = begun.run
        else:
            try:
                tensors = self._receive(task.session, task.body, frames)
            finally:  # afterwards, because it may be something that this job itself brought
                for key in task.forget:
                    self._kept.pop(key, None)
            self._components.copy_to_device(task.regions.values())
            run = begin_run(task, task.body, tensors, self._engines)
        goes_on = False
        try:
            result = run.advance()
            goes_on = isinstance(result, Progress)
        except (OutOfMemory, torch.OutOfMemoryError):
            goes_on = task.body is None  # as it was: it may be tried again with more room
            raise
        finally:
            if goes_on:
                self._runs[task.job] = _Begun(task.session, run)
            else:
                run.end()
        if isinstance(result, Progress):
            parts, data = self._send(result.tensors)
            return m.Step(step=result.step, steps=result.steps, tensors=parts), data
        parts, data = self._send(result, task)
        return m.Output(parts), data

    def _receive(self, session: str, job: m.Job, frames: Frames) -> dict[str, Tensor]:
        """A job's tensors, on the device."""
        tensors = {}
        arriving = iter(frames)
        scratch = m.scratch_of(job)
        for part in job.tensors:
            key = (session, part.digest or b"")
            if part.offset is not None:
                tensor = self._scratches.read(session, scratch, part, self._group.device)
            elif part.inline:
                tensor = unpack_tensor(part, arriving, copy=False).to(self._group.device)
                if part.digest is not None:
                    self._kept[key] = tensor
            elif (kept := self._kept.get(key)) is not None:
                tensor = kept
            else:
                raise Internal(f"rank {self._group.rank} has lost the tensor {part.name!r}")
            tensors[part.name] = tensor
        return tensors

    def _send(
        self, tensors: Mapping[str, Tensor], task: m.TurnTask | None = None
    ) -> tuple[list[m.TensorPart], list[memoryview]]:
        """Descriptions and frames; none of these where the task's client has room for the bytes."""
        for name, tensor in tensors.items():
            check_output(name, tensor.nbytes)  # looked at by all ranks: all must end alike
        if self._group.rank != 0:
            return [], []
        if task is not None and task.body is not None and m.scratch_of(task.body) is not None:
            left = self._scratches.write(task.session, task.body, tensors)
            if left is not None:
                return left, []
        packed = [pack_tensor(name, tensor) for name, tensor in tensors.items()]
        return [part for part, _ in packed], [frame for _, frames in packed for frame in frames]

    def _give_up(self) -> None:
        """Free what can be had again, but for what unfinished jobs go on with."""
        busy = {begun.session for begun in self._runs.values()} | {self._at_work}
        self._engines.denoiser.forget_others(busy)
        self._components.give_up_copies()

    def _forget_session(self, session: str) -> None:
        self._engines.denoiser.forget_session(session)
        self._scratches.forget_session(session)
        for key in [key for key in self._kept if key[0] == session]:
            del self._kept[key]

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> SidecarError:
        text = (str(error).splitlines() or [""])[0]
        if self._group.world_size > 1:
            # The others may be waiting for this one in a collective.
            return RankFault(f"rank {self._group.rank} ran out of device memory: {text}")
        return OutOfMemory(f"the rank ran out of device memory: {text}")


def load_engine(device_type: Literal["cpu", "cuda"]) -> None:
    """Import what is imported late otherwise, for ranks on that kind of device.

    Call it, and import this module, in :func:`.unasked_driver.unasked_driver`: ranks are forked
    afterwards. Raises XfuserUnusable, or what diffusers does: ImportError or RuntimeError.
    """
    for model in ("autoencoders.autoencoder_kl", "transformers.transformer_flux"):
        importlib.import_module(f"diffusers.models.{model}")
    load_xfuser(torch.device(device_type))


def load_text_encoders() -> None:
    """Import what text encoders are built of; else the first text waits for it. As above."""
    for model in ("clip", "t5"):
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def _probe(task: m.ProbeTask, take: TakeDescriptor) -> bytes:
    number = task.grant.descriptor
    try:
        return perform_probe(task, None if number is None else take(number))
    except (CudaError, RuntimeError) as error:
        raise MissingComponent(str(error)) from None


def _torch_device(name: str) -> torch.device:
    """The device of a region's name, as this process's torch calls it."""
    if name == "cpu":
        return torch.device("cpu")
    driver = CudaDriver.load()
    ordinal = driver.ordinal_of(name)
    if torch.cuda.is_available():
        return torch.device("cuda", ordinal)
    with driver.context(ordinal):
        probe = driver.mem_alloc(1)
        on_host = driver.is_host_memory(probe)
        driver.mem_free(probe)
    if not on_host:
        raise RuntimeError(
            f"the daemon's torch {torch.__version__} cannot use {name}: install a build of torch "
            "for this machine's driver into the daemon's environment"
        )
    return torch.device("cpu")
