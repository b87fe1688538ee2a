"""Errors that cross the protocol, one class per code.

Every message says what happened, to what, and what to do next; none contains a handle or a token.
``retryable`` means that the same call may succeed later without anyone changing anything.
"""

from __future__ import annotations

from typing import ClassVar


class SidecarError(Exception):
    """Base of everything that the client raises on purpose."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class BadMessage(SidecarError):
    """The peer sent bytes that are not a valid message of this protocol."""

    code = "bad-message"


class TooLarge(BadMessage):
    """A message exceeds one of the numbers in :mod:`.limits`."""

    code = "too-large"


class Unauthorized(SidecarError):
    """Unknown token, or a token that belongs to another process."""

    code = "unauthorized"


class NotAllowed(SidecarError):
    """The peer's uid is not on the daemon's allow-list."""

    code = "not-allowed"


class VersionMismatch(SidecarError):
    """Another major version of the protocol."""

    code = "version"


class Busy(SidecarError):
    """Too many sessions or requests in flight."""

    code = "busy"
    retryable = True


class Unsupported(SidecarError):
    """A valid message from a sender that may not send it: only ranks are given tasks."""

    code = "unsupported"


class UnknownDevice(SidecarError):
    """The daemon does not serve that device."""

    code = "unknown-device"


class DeviceUnavailable(SidecarError):
    """The device's keeper is starting, restarting or has failed."""

    code = "device-unavailable"
    retryable = True


class UnknownComponent(SidecarError):
    """No such component, region or lease, or it belongs to someone else."""

    code = "unknown-component"


class ManifestMismatch(SidecarError):
    """The same fingerprint was handed over before with another table of tensors."""

    code = "manifest-mismatch"


class InUse(SidecarError):
    """The component cannot be evicted: sessions hold leases on it."""

    code = "in-use"


class StillMapped(SidecarError):
    """Commit refused: the region is still mapped writable somewhere."""

    code = "still-mapped"


class FillLost(SidecarError):
    """The region that was being filled is gone (its keeper died); hand over again."""

    code = "fill-lost"
    retryable = True


class OutOfMemory(SidecarError):
    """Admission refused: the device has not enough free memory."""

    code = "out-of-memory"


class ProbeFailed(SidecarError):
    """A keeper or rank could not read or write a probed region."""

    code = "probe-failed"


class UnsupportedModel(SidecarError):
    """A readable weights file of another model or layout, or an incomplete one."""

    code = "unsupported-model"


class MissingComponent(SidecarError):
    """A job names a component that is not resident on the ranks' devices."""

    code = "missing-component"


NO_RANKS = (
    "this daemon has no ranks and only shares: it was configured with ranks = 0. Take that back "
    "(--ranks, XDIT_SIDECAR_RANKS or ranks in its file: `xdit-sidecar config` tells where it is), "
    "then restart it"
)


class RanksUnavailable(SidecarError):
    """The daemon has no ranks, or its rank group failed three times in a row."""

    code = "ranks-unavailable"


class RankLost(SidecarError):
    """A rank died or hung while it worked on the job; the group restarts by itself."""

    code = "rank-lost"
    retryable = True


class RankFault(SidecarError):
    """The ranks failed in a way that is not known to leave them in step; they are restarted."""

    code = "rank-fault"
    retryable = True


class BadJob(SidecarError):
    """A job that cannot be computed: tensors or degrees that do not fit the model."""

    code = "bad-job"


class Internal(SidecarError):
    """A fault of the daemon; its log has the details."""

    code = "internal"


# Raised by the client itself; they never travel.


class DaemonAbsent(SidecarError):
    """Nothing answers in the runtime directory."""

    code = "absent"
    retryable = True


class DaemonLost(SidecarError):
    """The session ended while waiting: the daemon stopped, restarted or dropped us."""

    code = "lost"
    retryable = True


class DeadlineExceeded(SidecarError):
    """No answer in time."""

    code = "deadline"
    retryable = True


class Cancelled(SidecarError):
    """The caller's ``should_cancel`` said so."""

    code = "cancelled"


class RegionUnavailable(SidecarError):
    """This process cannot open the region (driver refused, other namespace, wrong device)."""

    code = "region-unavailable"


class BadFile(SidecarError):
    """A weights file is not there, not readable, damaged or of another kind."""

    code = "bad-file"


def _all_subclasses(base: type[SidecarError]) -> list[type[SidecarError]]:
    found = []
    for cls in base.__subclasses__():
        found += [cls, *_all_subclasses(cls)]
    return found


_BY_CODE = {cls.code: cls for cls in _all_subclasses(SidecarError)}


def error_from_code(code: str, message: str) -> SidecarError:
    """The exception for a code that travelled; a code of a newer minor becomes Internal."""
    return _BY_CODE.get(code, Internal)(message)
