"""`load` draws a bar on a terminal, and nothing but its one line elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from daemon_process import DaemonProcess, running_daemon
from picture_scene import TINY
from service.terminal import on_terminal


def load(daemon: DaemonProcess, file: Path) -> list[str]:
    program = [sys.executable, "-m", "xdit_sidecar.daemon"]
    return [*program, "load", str(file), "--runtime-dir", str(daemon.runtime_dir)]


def test_a_load_has_a_bar_on_a_terminal(tmp_path: Path) -> None:
    files = TINY.write(tmp_path).paths
    with running_daemon(tmp_path) as daemon:
        vae, clip = files["vae"], files["clip_l"]
        with on_terminal(load(daemon, vae)) as (process, terminal):
            terminal.wait_for(f"vae {vae.name} → cpu")
            terminal.wait_for("━━━")
            terminal.wait_for("MiB")
            terminal.wait_for(f"vae: {vae.name} on cpu")
            terminal.wait_for("loaded")
            assert process.wait(20) == 0
        done = subprocess.run(
            load(daemon, clip), capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.endswith("loaded\n")
        assert (done.stdout.count("\n"), done.stderr) == (1, "")
