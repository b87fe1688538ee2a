"""A rank's worker in this process, with components in memory files and without a daemon."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import components
import msgspec
import torch
from xdit_sidecar.daemon.ranks.worker import Worker
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.manifest import region_bytes
from xdit_sidecar.protocol.regions.base import MappingBytes
from xdit_sidecar.protocol.regions.memfd import MemfdMapping, MemfdOwner
from xdit_sidecar.protocol.tensors import pack_tensor

Tensors = dict[str, torch.Tensor]


@dataclass
class SharedComponent:
    """A sealed region, and a descriptor that whoever opens it takes over."""

    opened: m.OpenedRegion
    descriptor: int

    @classmethod
    def of(cls, tensors: Tensors, role: str, region: str) -> SharedComponent:
        component = msgspec.structs.replace(components.describe(tensors, role), role=role)
        nbytes = region_bytes(component.tensors)
        owner = MemfdOwner()
        owner.allocate(region, nbytes)
        filled = MemfdMapping(owner.export(region).descriptor or -1, nbytes, writable=True)
        RegionWriter(component, MappingBytes(filled)).copy_tensors(tensors)
        filled.close()
        owner.seal(region)
        descriptor = owner.export(region).descriptor
        owner.close()
        assert descriptor is not None
        grant = m.RegionGrant(region=region, kind="memfd", device="cpu", nbytes=nbytes)
        return cls(m.OpenedRegion(grant=grant, component=component), descriptor)


@dataclass
class RankWorker:
    """Gives a worker its tasks, as the broker does."""

    worker: Worker
    regions: dict[str, str] = field(default_factory=dict)  # fingerprint → region
    roles: dict[str, str] = field(default_factory=dict)  # role → fingerprint
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def do(self, task: m.Task, frames: list[memoryview] | None = None) -> m.Outcome:
        """The outcome; AssertionError for a task that failed unexpectedly is the caller's."""
        return self.worker.perform(task, frames or [], lambda number: number)[0]

    def open(self, tensors: Tensors, role: str) -> str:
        """Have a component open; its region."""
        region = f"{next(self._numbers):032x}"
        shared = SharedComponent.of(tensors, role, region)
        grant = msgspec.structs.replace(shared.opened.grant, descriptor=shared.descriptor)
        opened = msgspec.structs.replace(shared.opened, grant=grant)
        outcome = self.do(m.OpenTask(task=next(self._numbers), regions=[opened]))
        assert isinstance(outcome, m.Opened), outcome
        self.roles[role] = opened.component.fingerprint
        self.regions[opened.component.fingerprint] = region
        return region

    def close(self, *regions: str) -> m.Outcome:
        return self.do(m.CloseTask(task=next(self._numbers), regions=list(regions)))

    def trim(self) -> m.Outcome:
        return self.do(m.TrimTask(task=next(self._numbers)))

    def drop(self, *, jobs: list[int] | None = None, sessions: list[str] | None = None) -> None:
        task = m.DropTask(task=next(self._numbers), jobs=jobs or [], sessions=sessions or [])
        assert isinstance(self.do(task), m.Done)

    def begin(self, job: int, body: m.Job, tensors: Tensors, session: str = "s") -> m.Outcome:
        """A job's first turn, with its tensors."""
        packed = [pack_tensor(name, tensor) for name, tensor in tensors.items()]
        body = msgspec.structs.replace(
            body, components=self.roles, tensors=[part for part, _ in packed]
        )
        task = m.TurnTask(
            task=next(self._numbers), job=job, session=session, body=body, regions=self.regions
        )
        return self.do(task, [frame for _, frames in packed for frame in frames])

    def go_on(self, job: int, session: str = "s") -> m.Outcome:
        """A job's next turn."""
        return self.do(m.TurnTask(task=next(self._numbers), job=job, session=session))
