"""The components that a rank has mapped, and what was built around them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar, cast

import torch

from ...protocol.errors import MissingComponent, RankFault
from ...protocol.messages import Component, RegionGrant
from ...protocol.regions.base import MappingBytes
from ...protocol.regions.table import process_regions
from ...protocol.regions.views import view_tensors
from ..models.parts import CLIP_L, T5
from ..models.sources import name_source
from .reservation import Reservation

Built = TypeVar("Built")

_UNMAP_SECONDS = 5.0
# Used for a moment before a picture's steps, and too large to lie beside them for nothing.
_COPIED_FOR_A_MOMENT = (CLIP_L, T5)
_COPY_OPTIONS = (
    "fp8 files, fewer resident components (`xdit-sidecar unload`), or prompts encoded by ComfyUI"
)


class OpenComponent:
    """One component, its tensors on the rank's device, and the modules made of them."""

    def __init__(self, component: Component, region: MappingBytes, device: torch.device) -> None:
        self.component = component
        self.mapped = weakref.ref(region)  # dead when nothing views it any more
        self._views = view_tensors(region, component.tensors)
        #: What modules are built of; before :meth:`copy` perhaps not on the rank's device.
        self.tensors = self._views
        self._device = device
        self._elsewhere = device.type != "cpu" and region.mapping.on_host
        self._built: dict[Hashable, object] = {}

    @property
    def copied_bytes(self) -> int:
        """Of the rank's own copy: of a component in host memory that a GPU works with."""
        return 0 if self.tensors is self._views else self._nbytes

    @property
    def bytes_to_copy(self) -> int:
        """What :meth:`copy` would allocate."""
        return self._nbytes if self._elsewhere and self.tensors is self._views else 0

    def copy(self) -> None:
        """Have the tensors on the rank's device."""
        if self.bytes_to_copy:
            self.tensors = {name: view.to(self._device) for name, view in self._views.items()}

    def give_up_copy(self) -> None:
        """Free the rank's own copy and what was built around it."""
        if self.copied_bytes:
            self.tensors = self._views
            self._built.clear()

    @property
    def _nbytes(self) -> int:
        return sum(view.nbytes for view in self._views.values())

    def without_prefix(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors by their names in a file of this component alone."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}

    def build(self, what: Hashable, make: Callable[[], Built]) -> Built:
        """What was built around the tensors before under this name, or what ``make`` makes."""
        if what not in self._built:
            self._built[what] = make()
        return cast(Built, self._built[what])

    def built(self, kind: type[Built]) -> list[Built]:
        """Everything of a kind that was built around the tensors."""
        return [found for found in self._built.values() if isinstance(found, kind)]


class OpenComponents:
    """By region. Everything that views a region goes when it is closed."""

    def __init__(self, device: torch.device, reservation: Reservation) -> None:
        self._device = device
        self._reservation = reservation
        self._open: dict[str, OpenComponent] = {}
        self._wanted: frozenset[str] = frozenset()  # regions that are about to be copied

    def open(self, grant: RegionGrant, component: Component, descriptor: int | None) -> None:
        """Map a region. Takes over ``descriptor``. Raises RegionUnavailable."""
        mapping = process_regions.acquire(grant, descriptor)
        region = MappingBytes(mapping)
        weakref.finalize(region, process_regions.release_later, grant).atexit = False
        self._open[grant.region] = OpenComponent(component, region, self._device)

    def close(self, regions: list[str]) -> None:
        """Forget everything around these regions, and unmap them.

        Raises RankFault if one stays mapped: its memory must not be freed under this process.
        """
        closed = [self._open.pop(region) for region in regions if region in self._open]
        mapped = [(component.component.label, component.mapped) for component in closed]
        del closed
        gc.collect()  # modules refer to themselves
        viewed = [label for label, region in mapped if region() is not None]
        if viewed:
            raise RankFault(
                f"something still views {', '.join(viewed)} after its region was closed"
            )
        if not process_regions.collect(_UNMAP_SECONDS):
            raise RankFault(f"regions could not be unmapped within {_UNMAP_SECONDS:g} s")

    def copy_to_device(self, regions: Iterable[str]) -> None:
        """Have what a job computes with on the device: what lies in host memory is copied.

        Called by all ranks, whose copies may lie elsewhere. Raises OutOfMemory on all alike.
        """
        if self._device.type == "cpu":
            return
        self._wanted = frozenset(regions)
        wanted = [found for region, found in self._open.items() if region in self._wanted]
        try:
            self._reservation.check_lasting(
                sum(component.bytes_to_copy for component in wanted),
                "the ranks' copies of components in host memory",
                _COPY_OPTIONS,
            )
        finally:
            self._wanted = frozenset()
        for component in wanted:
            component.copy()

    def give_up_copies(self) -> None:
        """Free the copies of text encoders; a job that needs them makes them anew."""
        for region, component in self._open.items():
            if component.component.role in _COPIED_FOR_A_MOMENT and region not in self._wanted:
                component.give_up_copy()

    @property
    def copied_bytes(self) -> int:
        """Of this rank's own copies of components in host memory, on its device."""
        return sum(component.copied_bytes for component in self._open.values())

    def find(self, region: str | None, role: str) -> OpenComponent:
        """The component in a region. Raises MissingComponent naming its role."""
        found = self._open.get(region or "")
        if found is None:
            raise MissingComponent(
                f"this job names no {role}, and needs one: {name_source(role)}, and name it"
            )
        return found

    def built(self, kind: type[Built]) -> list[Built]:
        """Everything of a kind that was built around open components."""
        return [found for component in self._open.values() for found in component.built(kind)]
