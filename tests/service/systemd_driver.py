"""Drives the service inside the namespaces of ``boot_systemd.sh`` and writes what it saw.

``systemd_driver.py system|user RESULTS``. Every observation is one key of a JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

KIND, RESULTS = sys.argv[1], Path(sys.argv[2])
CONTROL = ["systemctl"] if KIND == "system" else ["systemctl", "--user"]
CONFIG = Path(
    "/etc/xdit-sidecar/config.toml"
    if KIND == "system"
    else os.path.expanduser("~/.config/xdit-sidecar/config.toml")
)


class Seen(dict[str, object]):
    """What was seen so far; each step is printed, with its time."""

    def __setitem__(self, key: str, value: object) -> None:
        print(f"{time.monotonic():.1f} {key}: {value}", flush=True)
        super().__setitem__(key, value)


seen = Seen()


def systemctl(*arguments: str) -> int:
    return subprocess.run([*CONTROL, *arguments], check=False, timeout=120).returncode


def show(name: str) -> str:
    command = [*CONTROL, "show", "--value", "-p", name, "xdit-sidecar"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def active() -> bool:
    return show("ActiveState") == "active"


def replaced(pid: str) -> bool:
    """Whether another process than `pid` is the service, which has none between two."""
    return active() and show("MainPID") not in ("0", pid)


def drive() -> None:
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text(f'device = "cpu"\nranks = 2\ntrust-uid = [{os.getuid()}]\n')
    seen["start"] = systemctl("start", "xdit-sidecar")
    first = show("MainPID")
    seen["ranks"] = wait(lambda: "2 of 2 ranks ready" in show("StatusText"), 120)
    seen["status text"] = show("StatusText")
    # Whoever names no directory finds it.
    command = [sys.executable, "-m", "xdit_sidecar.daemon", "status", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    seen["client"] = [answer.returncode, answer.stderr]
    with contextlib.suppress(ValueError):
        seen["client pid"] = str(json.loads(answer.stdout)["pid"]) == first
    # Ranks are gone from the next start on, which is then much faster.
    CONFIG.write_text(CONFIG.read_text().replace("ranks = 2", "ranks = 0\nidle = 100"))
    seen["reload"] = [systemctl("reload", "xdit-sidecar"), wait(active), show("MainPID") == first]
    os.kill(int(first), signal.SIGSEGV)
    seen["restarted"] = wait(lambda: replaced(first))
    second = show("MainPID")
    assert second not in ("0", first)  # 0 would be this process, too
    os.kill(int(second), signal.SIGUSR2)  # blocks the event loop, see blockable/
    began = time.monotonic()
    seen["watchdog"] = wait(lambda: show("Result") == "watchdog" or show("MainPID") != second, 60)
    seen["watchdog seconds"] = time.monotonic() - began
    seen["restarted again"] = wait(lambda: replaced(second))
    seen["restarts"] = show("NRestarts")
    began = time.monotonic()
    systemctl("stop", "xdit-sidecar")
    seen["stop"] = [show("ActiveState"), show("Result"), show("ExecMainStatus")]
    seen["stop seconds"] = time.monotonic() - began
    directory = Path("/run" if KIND == "system" else os.environ["XDG_RUNTIME_DIR"], "xdit-sidecar")
    seen["left"] = sorted(p.name for p in directory.iterdir()) if directory.exists() else []
    CONFIG.write_text("ranks = -1\n")
    seen["wrong start"] = systemctl("start", "xdit-sidecar")
    time.sleep(4)  # longer than RestartSec
    seen["wrong"] = [show("ActiveState"), show("ExecMainStatus"), show("NRestarts")]
    seen["wrong text"] = show("StatusText")


try:
    drive()
except Exception as error:
    seen["error"] = repr(error)
    raise
finally:
    RESULTS.with_suffix(".new").write_text(json.dumps(seen))
    RESULTS.with_suffix(".new").replace(RESULTS)
