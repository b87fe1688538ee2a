"""A forward as one thing that the GPU repeats, because launching its kernels takes long.

On two H200s a compiled step at 1024² is two thousand kernels of 75 ms, and 95 ms of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..parallel.rotation import KeptRotations, Tables
from ..parallel.transformer import FluxInputs


class Graph(Protocol):
    """Work that was written down once and can be done again, on the same memory."""

    @property
    def nbytes(self) -> int:
        """Of the device's memory that nobody else can have meanwhile, in bytes."""
        ...

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Write down what ``work`` launches, without doing it; once.

        The tensor that ``work`` returns holds its result after each :meth:`replay`. Raises what
        ``work`` raises, and RuntimeError for what cannot be written down.
        """
        ...

    def replay(self) -> None:
        """Do it, in order with what else the device is given."""
        ...


class CudaGraph:
    """A `Graph` of CUDA's (``torch.cuda.CUDAGraph``), with a memory pool of its own."""

    _stream: ClassVar[torch.cuda.Stream | None] = None

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self.nbytes = 0

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """See `Graph.record`. Gives cached device memory back before."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = _unused_bytes()
        # One for all: torch's are few, and another one's may be that of an exchange.
        if CudaGraph._stream is None:
            CudaGraph._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream = CudaGraph._stream
        own: list[Exception] = []  # emptied, as its frames hold all that there was
        try:
            # torch returns to the stream before only if all went well. Other threads, NCCL's
            # watchdog among them, may ask CUDA what they like meanwhile.
            with (
                _workspaces_apart(),
                torch.cuda.stream(stream),
                torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = work()
                except Exception as error:
                    own.append(error)
                    raise
        except Exception:
            if not own:
                raise
        if own:  # it says more than why the capture could not end because of it
            raise own.pop()
        self.nbytes = max(0, _unused_bytes() - before)
        return result

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


class RecordedForward:
    """One forward of a transformer for inputs of one kind, recorded."""

    def __init__(
        self,
        graph: Graph,
        inputs: FluxInputs,
        rotations: KeptRotations,
        compute: Callable[[FluxInputs], Tensor],
        read: object = None,
    ) -> None:
        """``compute`` is what is recorded; it has run with such inputs just now. Raises as it does.

        ``rotations``: the model's. What ``compute`` reads besides must stay where it is: ``read``
        is kept alive.
        """
        self._graph = graph
        self._read = read
        self._rotations = rotations
        self._inputs = replace(
            inputs, **{name: tensor.clone() for name, tensor in _on_device(inputs)}
        )
        cosines, sines = _tables(rotations, inputs)
        self._tables = cosines.clone(), sines.clone()
        self._output = graph.record(partial(self._compute, compute))

    @property
    def nbytes(self) -> int:
        """Of the device's memory, in bytes, that nobody else can have."""
        return self._graph.nbytes

    def replay(self, inputs: FluxInputs) -> Tensor:
        """What ``compute`` gives for inputs of the same shapes and dtypes, any positions."""
        given = (*(tensor for _, tensor in _on_device(inputs)), *_tables(self._rotations, inputs))
        kept = (*(tensor for _, tensor in _on_device(self._inputs)), *self._tables)
        for mine, others in zip(kept, given, strict=True):
            mine.copy_(others)
        self._graph.replay()
        return self._output.clone()

    def _compute(self, compute: Callable[[FluxInputs], Tensor]) -> Tensor:
        with self._rotations.fixed(self._tables):
            return compute(self._inputs)


def kind_of(inputs: FluxInputs) -> tuple[object, ...]:
    """What must be the same for a recording to fit."""
    return tuple((name, tuple(t.shape), t.dtype) for name, t in _on_device(inputs))


def _on_device(inputs: FluxInputs) -> list[tuple[str, Tensor]]:
    """All but the positions, which lie in host memory."""
    named = ((field.name, getattr(inputs, field.name)) for field in fields(inputs))
    return [(n, t) for n, t in named if t is not None and n not in ("img_ids", "txt_ids")]


def _tables(rotations: KeptRotations, inputs: FluxInputs) -> Tables:
    """As the model asks for them."""
    tables: Tables = rotations(torch.cat([inputs.txt_ids, inputs.img_ids]))
    return tables


@contextmanager
def _workspaces_apart() -> Iterator[None]:
    """Within it cuBLAS makes workspaces of its own, which nobody uses afterwards.

    torch keeps one for each stream: a recording would use another one's, which may be freed.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _unused_bytes() -> int:
    """Of memory that torch has from the device, what no tensor lies in."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
