"""What the daemon can be told, checked once at start."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..protocol import limits
from ..protocol import messages as m
from ..protocol.endpoints import Endpoints


class SettingsError(ValueError):
    """A setting is wrong; the text names it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in bytes, times in seconds."""

    endpoints: Endpoints
    devices: tuple[str, ...]  # "cpu" or GPU UUIDs
    no_gpu: str = ""  # why no GPU is served although a driver is installed
    ranks: int = 0
    compiles: m.Compile = "auto"  # whether ranks compile transformers; "auto": on a GPU
    deadline: float = 60.0  # of one task of the ranks, and of one exchange among them
    budget: int | None = None  # per device, for regions; None: all but the reserve
    reserve: int = 512 * limits.MIB  # stays free on each device for others
    idle_seconds: float = 0.0  # 0: an unleased component stays until room is needed
    trusted_uids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if not self.devices:
            raise SettingsError("devices: at least one is needed")
        for name in ("ranks", "reserve", "idle_seconds"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name}: {getattr(self, name)} is negative")
        if self.ranks > limits.RANKS:
            raise SettingsError(f"ranks: {self.ranks} is more than {limits.RANKS}")
        if self.deadline < 1:
            raise SettingsError(f"deadline: {self.deadline:g} s is less than one second")
        if self.budget is not None and self.budget < limits.REGION_GRANULE:
            smallest = limits.REGION_GRANULE // limits.MIB
            raise SettingsError(
                f"budget (--budget): {self.budget} bytes is less than the smallest region, "
                f"{smallest} MiB"
            )

    @property
    def allowed_uids(self) -> frozenset[int]:
        """Who may open a session: the daemon's own account and those that it is told to trust."""
        return self.trusted_uids | {os.geteuid()}

    @property
    def shared(self) -> bool:
        """Whether other accounts must be able to reach the sockets."""
        return bool(self.trusted_uids - {os.geteuid()})
