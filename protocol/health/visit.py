"""What the checks of one run share: the time, the client, and what the daemon said."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .. import messages as m
from ..client.client import Client
from ..client.deadline import Deadline, ShouldCancel
from ..client.session import ClientSession
from ..endpoints import Endpoints
from ..errors import SidecarError


@dataclass
class MemoryCost:
    """Free bytes of a device around one region, and what a first use of the device cost.

    ``context`` is what this process took when it opened its first region there: its CUDA context,
    which is as large as the keeper's. Small numbers mean that it existed already.
    """

    nbytes: int
    before: int
    during: int
    after: int
    context: int


@dataclass
class Visit:
    """One run. ``status`` is the daemon's report from the beginning of the run."""

    endpoints: Endpoints
    client: Client
    deadline: Deadline
    should_cancel: ShouldCancel | None = None
    session: ClientSession | None = None
    status: m.Status | None = None
    mismatch: SidecarError | None = None  # the daemon answered, and refused our version
    daemon_absent: bool = False
    memory: dict[str, MemoryCost] = field(default_factory=dict)

    @property
    def opened(self) -> ClientSession:
        """The session; only for checks that need the daemon."""
        assert self.session is not None  # noqa: S101  the runner skips them otherwise
        return self.session

    @property
    def report(self) -> m.Status:
        """The first status; only for checks that need the daemon."""
        assert self.status is not None  # noqa: S101
        return self.status

    @property
    def uses_gpu(self) -> bool:
        """Whether any device is not host memory."""
        return any(device.kind != "memfd" for device in self.report.devices)

    def fresh_status(self) -> m.Status:
        """The daemon's report, now."""
        return self.client.status(timeout=self.deadline.remaining, should_cancel=self.should_cancel)

    def own_session(self) -> m.SessionStatus | None:
        """What the daemon says of this process."""
        name = self.opened.welcome.session
        return next((s for s in self.report.sessions if s.session == name), None)


def is_shared(endpoints: Endpoints) -> bool:
    """Whether a runtime directory looks like that of a daemon that trusts other accounts."""
    try:
        if not os.stat(endpoints.directory).st_mode & 0o011:
            return False
        return all(os.stat(path).st_mode & 0o066 for path in endpoints.sockets)
    except OSError:
        return False
