"""What a check found, and the report that all of them make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

CheckStatus = Literal["ok", "warn", "fail", "skip"]

REGION_CHECK = "region"  # with the device's name behind it


class Finding(NamedTuple):
    """What a check function returns; the runner adds its name and how long it took."""

    status: CheckStatus
    detail: str
    fix: str = ""


def passed(detail: str) -> Finding:
    """As it should be."""
    return Finding("ok", detail)


def warning(detail: str, fix: str) -> Finding:
    """It works, and somebody should know."""
    return Finding("warn", detail, fix)


def failed(detail: str, fix: str) -> Finding:
    """It does not work; ``fix`` is what to do next."""
    return Finding("fail", detail, fix)


def skipped(reason: str, fix: str = "") -> Finding:
    """Not looked at."""
    return Finding("skip", reason, fix)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report. ``ok`` is False only for a failure; ``ms`` is milliseconds."""

    name: str
    status: CheckStatus
    ok: bool
    detail: str
    fix: str
    ms: float

    @classmethod
    def of(cls, name: str, finding: Finding, seconds: float) -> Check:
        """A finding with its name and time."""
        return cls(
            name=name,
            status=finding.status,
            ok=finding.status != "fail",
            detail=finding.detail,
            fix=finding.fix,
            ms=round(seconds * 1000, 3),
        )


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """All checks in the order in which they ran.

    ``ok``: nothing failed and a region was proved on every device that the daemon serves.
    """

    ok: bool
    checks: list[Check]
    daemon_absent: bool = False

    @classmethod
    def of(
        cls, checks: Sequence[Check], devices: Sequence[str], *, daemon_absent: bool = False
    ) -> HealthReport:
        """The report of these checks, with the verdict."""
        proved = {check.name for check in checks if check.status == "ok"}
        return cls(
            ok=all(check.ok for check in checks)
            and bool(devices)
            and all(f"{REGION_CHECK} {device}" in proved for device in devices),
            checks=list(checks),
            daemon_absent=daemon_absent,
        )

    def to_json(self) -> str:
        """``{"ok": …, "checks": [{"name", "status", "ok", "detail", "fix", "ms"}]}``."""
        return msgspec.json.encode({"ok": self.ok, "checks": self.checks}).decode()
