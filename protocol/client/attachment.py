"""A component that this process maps: its tensors, its lease."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import RegionUnavailable
from ..messages import Component, RegionGrant
from ..regions.base import MappingBytes, RegionMapping

if TYPE_CHECKING:
    import torch


class Attachment:
    """Holds a lease until it is released *and* the last tensor that views the region is gone.

    Only then is the region unmapped and the daemon told, so that a component which somebody still
    computes with is never evicted. (Closing the client ends the lease all the same: close it last.)
    """

    def __init__(
        self,
        component: Component,
        grant: RegionGrant,
        mapping: RegionMapping,
        let_go: Callable[[], None],
    ) -> None:
        self.component = component
        self.device = grant.device
        self.region = grant.region
        self.nbytes = grant.nbytes
        #: Set when the region's keeper died: it stays valid; :meth:`Client.renew` moves off it.
        self.orphaned = threading.Event()
        self._bytes: MappingBytes | None = MappingBytes(mapping)
        finalizer = weakref.finalize(self._bytes, let_go)
        finalizer.atexit = False

    @property
    def mapping(self) -> RegionMapping:
        """The region's map in this process. Raises RegionUnavailable after :meth:`release`."""
        return self.hold().mapping

    def hold(self) -> MappingBytes:
        """What keeps the region mapped while it is held. Raises RegionUnavailable if released."""
        held = self._bytes
        if held is None:
            raise RegionUnavailable(f"{self.component.label}: this attachment was released")
        return held

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of all tensors, by name, on the region's device. Never written to."""
        from ..regions.views import view_tensors

        return view_tensors(self.hold(), self.component.tensors)

    def contains(self, address: int) -> bool:
        """Whether a ``data_ptr`` lies inside the region."""
        mapping = self.mapping
        return mapping.address <= address < mapping.address + mapping.nbytes

    def release(self) -> None:
        """No further use from here on; takes effect when the last view is gone."""
        self._bytes = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
