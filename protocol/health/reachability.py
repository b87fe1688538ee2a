"""Can the daemon be reached, is it the right one, and may nobody stand in between?"""

from __future__ import annotations

import os
import stat

from ... import __version__
from ..client.deadline import Deadline
from ..endpoints import Endpoints, why_not_private
from ..errors import DaemonAbsent, VersionMismatch
from ..version import PROTOCOL_VERSION, ProtocolVersion
from .check import Finding, failed, passed, skipped, warning
from .units import human_age
from .visit import Visit, is_shared

_PRIVATE_DIRECTORY, _SHARED_DIRECTORY = 0o700, 0o711
_PRIVATE_SOCKET, _SHARED_SOCKET = 0o600, 0o666
_START = "start the daemon: `xdit-sidecar serve`"
_UPDATE = "update the older of the two, then restart the daemon"


def check_directory(visit: Visit) -> Finding:
    """Owner and mode of the runtime directory."""
    directory = visit.endpoints.directory
    shared = is_shared(visit.endpoints)
    loosest = _SHARED_DIRECTORY if shared else _PRIVATE_DIRECTORY
    try:
        found = directory.stat()
        problem = why_not_private(
            directory, owner=found.st_uid if shared else os.geteuid(), loosest=loosest
        )
    except FileNotFoundError:
        return failed(f"{directory} does not exist", f"{_START}, or name another --runtime-dir")
    except OSError as error:
        return failed(f"{directory} cannot be looked at: {error.strerror}", "check --runtime-dir")
    if not stat.S_ISDIR(found.st_mode):
        return failed(f"{directory} is no directory", "name another with --runtime-dir")
    if problem is not None:
        return failed(
            f"{problem}: others could stand between the daemon and its clients",
            f"as its owner `chmod {loosest:o} {directory}`, or use a directory of your own",
        )
    detail = f"{directory}: uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}"
    if found.st_uid not in (os.geteuid(), 0):
        return warning(
            f"{detail}; it belongs to another account, whose daemon sees what is handed over",
            f"go on only if you trust uid {found.st_uid}, or start a daemon of your own",
        )
    return passed(f"{detail}, shared with trusted accounts" if shared else detail)


def check_sockets(visit: Visit) -> Finding:
    """The three sockets exist, belong to the directory's owner, and are not open to others."""
    endpoints = visit.endpoints
    loosest = _SHARED_SOCKET if is_shared(endpoints) else _PRIVATE_SOCKET
    try:
        owner = endpoints.directory.stat().st_uid
        for path in endpoints.sockets:
            if not stat.S_ISSOCK(path.stat().st_mode):
                return failed(f"{path} is no socket", "remove it and restart the daemon")
            if (problem := why_not_private(path, owner=owner, loosest=loosest)) is not None:
                return failed(problem, f"`chmod {loosest:o} {path}`, or restart the daemon")
    except FileNotFoundError as error:
        return failed(f"{error.filename} does not exist", _START)
    except OSError as error:
        return failed(
            f"{error.filename} cannot be looked at: {error.strerror}",
            "use a daemon of your own account, or have its owner add your uid with --trust-uid",
        )
    names = ", ".join(path.name for path in endpoints.sockets)
    return passed(f"{names}: uid {owner}, mode at most {loosest:04o}")


def reach_daemon(visit: Visit) -> Finding:
    """Open a session and ask for the status."""
    try:
        # Half of the time: a daemon that hangs is to be reported with the rest.
        visit.session = visit.client.session(
            Deadline(visit.deadline.remaining / 2, visit.should_cancel)
        )
        visit.status = visit.fresh_status()
    except VersionMismatch as error:
        visit.mismatch = error
        return passed("it answers, with another major version of the protocol")
    except DaemonAbsent as error:
        visit.daemon_absent = True
        return failed(str(error), _START)
    status = visit.status
    return passed(
        f"pid {status.pid}, uid {status.uid}, up {human_age(status.uptime_seconds)}; devices: "
        + ", ".join(device.device for device in status.devices)
    )


def check_version(visit: Visit) -> Finding:
    """Protocol and package of daemon and client."""
    if visit.mismatch is not None:
        return failed(str(visit.mismatch), _UPDATE)
    return compare_versions(visit.opened.daemon_version, visit.opened.welcome.daemon)


def compare_versions(daemon: ProtocolVersion, package: str) -> Finding:
    """The daemon's protocol and package against ours; the majors are the same."""
    theirs, ours = f"protocol {daemon}, package {package}", f"{PROTOCOL_VERSION}, {__version__}"
    if daemon.minor != PROTOCOL_VERSION.minor:
        return warning(
            f"daemon: {theirs}; here: {ours}: they work together, without what the newer one added",
            _UPDATE,
        )
    if package != __version__:
        return warning(f"daemon: {theirs}; here: {ours}", _UPDATE)
    return passed(theirs)


def check_peer(visit: Visit) -> Finding:
    """The process behind the socket is the daemon that holds the directory's lock."""
    peer, status = visit.opened.daemon_peer, visit.report
    owner = visit.endpoints.directory.stat().st_uid
    if peer.uid != owner:
        return failed(
            f"uid {peer.uid} (pid {peer.pid}) answers on a socket in a directory of uid {owner}",
            "stop that process and start the daemon again as the directory's owner",
        )
    who = f"uid {peer.uid}, pid {peer.pid}"
    if peer.pid == 0 or peer.pid != status.pid:
        return warning(
            f"{who}; it calls itself pid {status.pid}: it runs in another PID namespace",
            "see the check `namespaces`",
        )
    holder = _lock_holder(visit.endpoints)
    if holder is None:
        return passed(f"{who}; the lock file cannot be read by this account")
    if holder != peer.pid:
        return failed(
            f"pid {peer.pid} answers, but {visit.endpoints.lock} names pid {holder}",
            "two daemons may have met: stop both, then start one",
        )
    return passed(f"{who}, holder of the lock")


def _lock_holder(endpoints: Endpoints) -> int | None:
    try:
        return int(endpoints.lock.read_text().strip() or "0")
    except PermissionError:
        return None
    except (OSError, ValueError):
        return 0


def refuse_rest(visit: Visit) -> Finding | None:
    """Why the checks that talk to the daemon are skipped, or None."""
    if visit.mismatch is not None:
        return skipped("needs a daemon of the same major version")
    if visit.status is None:
        return skipped("needs a daemon that answers")
    return None
