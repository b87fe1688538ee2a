"""Runs the checks in order, times each, and skips what cannot work any more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from ..client.client import Client
from ..client.deadline import Deadline, ShouldCancel
from ..errors import Cancelled, DaemonAbsent, SidecarError
from .check import REGION_CHECK, Check, Finding, HealthReport, failed
from .holdings import check_clients, check_ownership, check_ranks
from .nodes import check_nodes
from .reachability import (
    check_directory,
    check_peer,
    check_sockets,
    check_version,
    reach_daemon,
    refuse_rest,
)
from .regions import check_memory, probe_device
from .round_trip import check_bulk, check_control
from .surroundings import check_namespaces
from .visit import Visit

DEFAULT_SECONDS = 30.0

# Kept back from the region probes: giving up takes a moment, and the checks behind them are quick.
_TAIL_SHARE, _TAIL_SECONDS = 0.2, 2.0

CheckFunction = Callable[[Visit], Finding]

_REACH: tuple[tuple[str, CheckFunction], ...] = (
    ("runtime directory", check_directory),
    ("sockets", check_sockets),
    ("daemon", reach_daemon),
)
_TALK: tuple[tuple[str, CheckFunction], ...] = (
    ("peer", check_peer),
    ("control round trip", check_control),
    ("bulk round trip", check_bulk),
    ("device nodes", check_nodes),
    ("namespaces", check_namespaces),
)
_HOLDINGS: tuple[tuple[str, CheckFunction], ...] = (
    ("ranks", check_ranks),
    ("clients", check_clients),
    ("sessions and leases", check_ownership),
)


def run_checks(
    runtime_dir: str | os.PathLike[str] | None = None,
    *,
    timeout: float = DEFAULT_SECONDS,
    host: str | None = None,
    dynamic_vram: bool | None = None,
    should_cancel: ShouldCancel | None = None,
) -> HealthReport:
    """Check everything between this process and the daemon, within about ``timeout`` seconds.

    Never raises for what is wrong with the daemon: that is in the report. Raises RuntimeDirError
    when no directory can be meant, and Cancelled. ``host`` and ``dynamic_vram`` are told to the
    daemon as by any client.
    """
    with Client(runtime_dir, name="health-check", host=host, dynamic_vram=dynamic_vram) as client:
        visit = Visit(client.endpoints, client, Deadline(timeout, should_cancel), should_cancel)
        return _run(visit)


def wait_until_ready(
    runtime_dir: str | os.PathLike[str] | None, *, timeout: float, pause: float = 0.1
) -> float:
    """Wait until the daemon answers and no keeper and no rank is starting.

    Returns the seconds that are left of ``timeout``; 0 when it never came to that.
    """
    deadline = Deadline(timeout)
    with Client(runtime_dir, name="health-check") as client:
        while deadline.remaining:
            try:
                status = client.status(timeout=deadline.remaining)
            except SidecarError as error:
                if not error.retryable:
                    break  # waiting does not make an old daemon newer
            else:
                states = [part.state for part in status.devices]
                if "starting" not in states + [part.state for part in status.ranks]:
                    break
            time.sleep(min(pause, deadline.remaining))
    return deadline.remaining


def _run(visit: Visit) -> HealthReport:
    checks = [_timed(visit, name, check) for name, check in _REACH]
    # Without a session and without a refusal nobody knows the daemon's version.
    unreachable = refuse_rest(visit) if visit.mismatch is None else None
    checks.append(_timed(visit, "version", check_version, unreachable))
    refusal = refuse_rest(visit)
    checks += [_timed(visit, name, check, refusal) for name, check in _TALK]
    devices = [device.device for device in visit.status.devices] if visit.status else []
    for position, device in enumerate(devices):
        seconds = _share_of_time(visit.deadline.remaining, len(devices) - position)
        probe = partial(probe_device, device=device, seconds=seconds)
        checks.append(_timed(visit, f"{REGION_CHECK} {device}", probe))
        memory = partial(check_memory, device=device)
        checks.append(_timed(visit, f"memory {device}", memory))
    if not devices:
        checks.append(_timed(visit, REGION_CHECK, _no_device, refusal))
    checks += [_timed(visit, name, check, refusal) for name, check in _HOLDINGS]
    return HealthReport.of(checks, devices, daemon_absent=visit.daemon_absent)


def _share_of_time(remaining: float, parts: int) -> float:
    tail = min(_TAIL_SECONDS, remaining * _TAIL_SHARE)
    return (remaining - tail) / parts


def _no_device(visit: Visit) -> Finding:
    return failed("the daemon serves no device", "start it with `--device auto`")


def _timed(visit: Visit, name: str, check: CheckFunction, refusal: Finding | None = None) -> Check:
    begin = time.monotonic()
    finding = refusal if refusal is not None else _guarded(visit, check)
    return Check.of(name, finding, time.monotonic() - begin)


def _guarded(visit: Visit, check: CheckFunction) -> Finding:
    """A check that breaks is a finding, too: the others still run."""
    try:
        return check(visit)
    except Cancelled:
        raise
    except DaemonAbsent as error:
        return failed(str(error), "the daemon stopped while it was being checked: see its log")
    except SidecarError as error:
        return failed(str(error), _advice(error))
    except Exception as error:  # noqa: BLE001
        return failed(
            f"the check itself broke: {type(error).__name__}: {error}", "please report this"
        )


def _advice(error: SidecarError) -> str:
    advice = {
        "deadline": "the daemon hangs or its host is overloaded: see its log, then restart it",
        "lost": "the daemon stopped while it was being checked: see its log",
        "not-allowed": "start a daemon of your own, or have its owner run it with --trust-uid",
        "busy": "close clients that are not needed (`xdit-sidecar status`)",
        "bad-message": "something else listens on this socket: choose another --runtime-dir",
    }
    return advice.get(error.code, "see the daemon's log, then restart it")
