"""``status --watch`` on a terminal, in a pipe and as JSON, against real daemons."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from daemon_process import DaemonProcess, running_daemon
from service.terminal import on_terminal
from xdit_sidecar.protocol.client.fill import RegionWriter
from xdit_sidecar.protocol.manifest import TensorSpec, lay_out
from xdit_sidecar.protocol.messages import Component


def command(daemon: DaemonProcess, *options: str) -> list[str]:
    status = [sys.executable, "-m", "xdit_sidecar.daemon", "status", "--watch", "--every", "0.1"]
    return [*status, "--runtime-dir", str(daemon.runtime_dir), *options]


def test_a_table_that_lives(tmp_path: Path) -> None:
    component = Component(
        fingerprint=f"bytes:{0:064x}",
        role="vae",
        label="slow.file",
        tensors=lay_out([TensorSpec("weight", "U8", [4 << 20])]),
    )
    with running_daemon(tmp_path) as daemon, on_terminal(command(daemon)) as (process, terminal):
        terminal.wait_for("Devices")
        terminal.wait_for("none")

        def fill(writer: RegionWriter) -> None:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                writer.progressed(1 << 17)
                time.sleep(0.05)
            terminal.wait_for("filling ")
            terminal.wait_for("━")

        with daemon.client() as client:
            held = client.hand_over(component, "cpu", fill)
            terminal.wait_for("slow.file")
            terminal.wait_for("resident")
            held.release()
        terminal.wait_for("nobody")
        # A daemon that is gone is waited for.
        assert daemon.stop() == 0
        terminal.wait_for("no xdit-sidecar daemon answers")
        daemon.start()
        terminal.wait_for("Devices")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_in_a_pipe_and_as_json(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        for options in ([], ["--json"]):
            process = subprocess.Popen(
                command(daemon, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(40 if not options else 3)]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
            assert (process.returncode, errors) == (0, "")
            if options:
                assert len({json.loads(line)["uptime_seconds"] for line in lines}) == 3
            else:
                assert sum(line.startswith("Devices") for line in lines) >= 2
                assert "\x1b" not in "".join(lines)
