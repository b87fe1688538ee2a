"""One fill, from the grant to commit or abandonment."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import zmq

from .. import messages as m
from ..errors import SidecarError, StillMapped
from ..regions.base import MappingBytes, RegionMapping
from ..regions.cuda_driver import CudaError
from ..regions.file_parts import FilePart, OnBytes, unheard
from ..regions.table import process_regions
from .deadline import Deadline
from .session import ClientSession

if TYPE_CHECKING:
    import torch

Body = TypeVar("Body")

_ABANDON_SECONDS = 2.0


class RegionWriter:
    """The region that a fill callback writes. No view of it may outlive the callback.

    Its methods count what they bring in, but for :meth:`write` and what goes through
    :meth:`tensors`: whoever fills so calls ``progressed`` with the bytes that were added. What
    counts restarts the hand-over's timeout, and may raise Cancelled or DeadlineExceeded.
    """

    def __init__(
        self, component: m.Component, region: MappingBytes, progressed: OnBytes = unheard
    ) -> None:
        self.component = component
        self.progressed = progressed
        self._bytes = region

    @property
    def mapping(self) -> RegionMapping:
        """The writable map."""
        return self._bytes.mapping

    def tensors(self) -> dict[str, torch.Tensor]:
        """Writable views of all tensors, by name."""
        from ..regions.views import view_tensors

        return view_tensors(self._bytes, self.component.tensors)

    def copy_tensors(self, sources: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of the manifest's names, shapes and dtypes in, from any device.

        Ordinary host memory goes in by several threads, and is not waited for by streams: whatever
        wrote to it or to the region must be done. Raises BadMessage and CudaError.
        """
        from ..regions.views import copy_into

        copy_into(self._bytes, self.component.tensors, sources, self.progressed)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset of the region."""
        self.mapping.write(offset, data)

    def read_file(self, descriptor: int, position: int, offset: int, length: int) -> None:
        """Read ``length`` bytes of a file at ``position`` into the region at ``offset``.

        Raises OSError, and EOFError when the file ends before that.
        """
        self.read_file_parts(descriptor, [FilePart(position, offset, length)])

    def read_file_parts(
        self, descriptor: int, parts: Sequence[FilePart], on_bytes: OnBytes = unheard
    ) -> None:
        """Read many parts of a file: all at once, which is much faster than one after the other.

        ``on_bytes`` is told how many bytes more are there. Raises like :meth:`read_file`.
        """

        def count(nbytes: int) -> None:
            on_bytes(nbytes)
            self.progressed(nbytes)

        self.mapping.read_file_parts(descriptor, parts, count)

    def copy_region(self, source: RegionMapping) -> None:
        """Copy a whole region of the same layout: of another device, or one whose keeper died."""
        self.mapping.copy_region(source)
        self.progressed(source.nbytes)


class Ask(Protocol):
    """How a fill talks to the daemon: the client's request call."""

    def __call__(
        self,
        session: ClientSession,
        body: m.RequestBody,
        expected: type[Body],
        deadline: Deadline,
    ) -> Body: ...


class OpenFill:
    """A granted region, mapped writable. Leaving it without :meth:`commit` abandons the fill."""

    def __init__(
        self,
        ask: Ask,
        session: ClientSession,
        component: m.Component,
        grant: m.RegionGrant,
        deadline: Deadline,
        progressed: OnBytes = unheard,
    ) -> None:
        self._ask = ask
        self._session = session
        self._grant = grant
        self._deadline = deadline
        self._open = True
        try:
            number = grant.descriptor
            descriptor = None if number is None else session.take_descriptor(number, deadline)
            mapping = process_regions.acquire(grant, descriptor, writable=True)
        except BaseException:
            self._abandon()
            raise
        self._mapping = mapping
        region = MappingBytes(mapping)
        # The region stays open as long as anybody views it, whatever became of the fill.
        weakref.finalize(region, process_regions.release_later, grant, writable=True).atexit = False
        self.writer: RegionWriter | None = RegionWriter(component, region, progressed)

    def probe(
        self, reader: str, *, offset: int = 0, length: int = 32, write: bytes | None = None
    ) -> bytes:
        """Let the keeper or a rank read (or write) bytes of the region; see messages.Probe."""
        probe = m.Probe(
            region=self._grant.region, reader=reader, offset=offset, length=length, write=write
        )
        return self._ask(self._session, probe, m.Probed, self._deadline).data

    def commit(self) -> m.Attached:
        """Wait until everything written is there, unmap, and have the region sealed."""
        if self.writer is None:
            raise StillMapped("this fill is over")
        self.writer.mapping.synchronize()
        if self._grant.kind == "memfd":
            self._drop_views()
        commit = m.Commit(self._grant.region)
        attached = self._ask(self._session, commit, m.Attached, self._deadline)
        self._open = False
        return attached

    def _drop_views(self) -> None:
        """A host region can be sealed only when no writable map of it is left."""
        view = weakref.ref(self.writer._bytes) if self.writer else lambda: None
        self.writer = None
        if view() is not None:
            gc.collect()
        if view() is not None:
            raise StillMapped(
                "the fill callback kept a tensor that views the region: copy into it and keep "
                "nothing; the attachment has the tensors to keep"
            )

    def _abandon(self) -> None:
        self._open = False
        with contextlib.suppress(SidecarError, zmq.ZMQError):
            patience = min(_ABANDON_SECONDS, max(0.1, self._deadline.remaining))
            abandon = m.Abandon(self._grant.region)
            self._ask(self._session, abandon, m.Done, Deadline(patience))

    def __enter__(self) -> OpenFill:
        return self

    def __exit__(self, *exc: object) -> None:
        self.writer = None
        if self._open:
            # Copies may be in flight, and a traceback may hold the views for longer: the region is
            # given back only when nothing writes to it any more.
            with contextlib.suppress(CudaError):
                self._mapping.synchronize()
            # A device region is unmapped by another thread: the keeper frees it after that.
            process_regions.collect(_ABANDON_SECONDS)
            self._abandon()
