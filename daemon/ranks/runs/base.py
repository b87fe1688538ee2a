"""What every run has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from ....protocol import messages as m
from ..autoencoder import Autoencoder
from ..components import OpenComponents
from ..denoiser import Denoiser
from ..parallel.process_group import RankGroup
from ..text_encoding import TextEncoding

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """A turn is done, and more are to come; ``tensors`` perhaps has a "preview"."""

    step: int
    steps: int
    tensors: Tensors = field(default_factory=dict)


class Run(Protocol):
    """A job that is worked on; the same on every rank of the group."""

    def advance(self) -> Progress | Tensors:
        """Take one turn: Progress, or the outputs when it was the last.

        After OutOfMemory the same turn may be taken again.
        """
        ...

    def end(self) -> None:
        """No turn follows, whatever the reason: drop what was kept for the next one."""
        return


class Engines(NamedTuple):
    """What runs compute with."""

    group: RankGroup
    components: OpenComponents
    denoiser: Denoiser
    autoencoder: Autoencoder
    texts: TextEncoding


class Place(NamedTuple):
    """Where a job's things are found on this rank."""

    job: int  # its number, the same on every rank
    session: str
    regions: Mapping[str, str]  # fingerprint → region
    components: Mapping[str, str]  # role → fingerprint

    def loras(self, adapters: Iterable[m.Adapter]) -> list[tuple[str | None, float]]:
        """Region and strength of each adapter."""
        return [(self.regions.get(adapter.fingerprint), adapter.strength) for adapter in adapters]

    def region(self, role: str) -> str | None:
        """The region of the component that plays a role."""
        return self.regions.get(self.components.get(role, ""))


def require(tensors: Tensors, *names: str) -> list[Tensor]:
    """The tensors of these names. Raises ValueError naming one that did not come."""
    for name in names:
        if name not in tensors:
            raise ValueError(f"this job needs a tensor {name!r}; it brought {sorted(tensors)}")
    return [tensors[name] for name in names]
