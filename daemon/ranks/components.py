"""The components that a rank has mapped, and what was built around them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch

from ...protocol.errors import MissingComponent, RegionUnavailable
from ...protocol.messages import Component, RegionGrant
from ...protocol.regions.base import MappingBytes
from ...protocol.regions.table import process_regions
from ...protocol.regions.views import view_tensors
from ..models.sources import name_source

Built = TypeVar("Built")

_UNMAP_SECONDS = 5.0


class OpenComponent:
    """One component, its tensors on the rank's device, and the modules made of them."""

    def __init__(
        self, component: Component, grant: RegionGrant, region: MappingBytes, device: torch.device
    ) -> None:
        self.component = component
        tensors = view_tensors(region, component.tensors)
        #: Bytes of a copy of the rank's own: of a component in host memory that a GPU works with.
        self.copied_bytes = 0
        if device.type != "cpu" and region.mapping.on_host:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            self.copied_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.tensors = tensors
        self.region = grant.region
        self._built: dict[Hashable, object] = {}

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

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[str, OpenComponent] = {}

    def open(self, grant: RegionGrant, component: Component, descriptor: int | None) -> None:
        """Map a region. Takes over ``descriptor``. Raises RegionUnavailable."""
        mapping = process_regions.acquire(grant, descriptor)
        region = MappingBytes(mapping)
        weakref.finalize(region, process_regions.release_later, grant).atexit = False
        try:
            self._open[grant.region] = OpenComponent(component, grant, region, self._device)
        except torch.OutOfMemoryError:
            raise RegionUnavailable(
                f"{component.label} lies in host memory, and there is no room on the device for "
                f"the ranks' copy of it ({mapping.nbytes} bytes)"
            ) from None

    def close(self, regions: list[str]) -> None:
        """Forget everything around these regions, and unmap them."""
        for region in regions:
            self._open.pop(region, None)
        gc.collect()  # modules refer to themselves
        process_regions.collect(_UNMAP_SECONDS)

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
