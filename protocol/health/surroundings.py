"""The world this process runs in, compared with the daemon's: PID namespace, container."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .check import Finding, passed, warning
from .visit import Visit

_FIX = (
    "run the container with `--pid=host --ipc=host` (compose: `pid: host`, `ipc: host`), or run "
    "the daemon in the same container"
)
_RUNTIMES = re.compile(r"docker|kubepods|containerd|libpod|podman|lxc|garden")


def check_namespaces(visit: Visit) -> Finding:
    """Whether daemon and client give processes the same numbers, and run in a container."""
    own = visit.own_session()
    container = describe_container()
    here = f"this process runs in {container}" if container else "no container seen"
    peer = visit.opened.daemon_peer
    if own is None or (own.hello.pid == own.pid and peer.pid == visit.report.pid):
        return passed(f"{here}; the daemon is in the same PID namespace")
    detail = (
        f"{here}; pid {own.hello.pid} here is pid {own.pid} for the daemon: they are in "
        "different PID namespaces"
    )
    if not visit.uses_gpu:
        return passed(f"{detail}, which host memory does not mind")
    return warning(
        f"{detail}, where some drivers refuse CUDA IPC; the region checks tell whether this one "
        "does",
        _FIX,
    )


def describe_container(root: Path = Path("/")) -> str | None:
    """What kind of container this process runs in, as far as it shows; None if nothing does."""
    if (root / "run/.containerenv").exists():
        return "a podman container"
    if (root / ".dockerenv").exists():
        return "a docker container"
    if name := os.environ.get("container"):  # noqa: SIM112  systemd's convention, in small letters
        return f"a container ({name[:32]})"
    try:
        found = _RUNTIMES.search((root / "proc/1/cgroup").read_text(errors="replace"))
    except OSError:
        return None
    return f"a container ({found[0]})" if found else None
