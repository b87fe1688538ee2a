"""A daemon in order is told so, on every platform, with and without ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import leaks
import pytest
from daemon_process import DaemonProcess, running_daemon
from health_command import command, health_check, run_command
from platforms import Platform
from xdit_sidecar.protocol.health.runner import run_checks


def test_a_daemon_in_order_is_healthy(daemon: DaemonProcess, platform: Platform) -> None:
    answer = health_check(daemon.runtime_dir)
    assert answer.code == 0
    assert not answer.named("warn")
    for device in {platform.device, "cpu"}:
        region = answer.check(f"region {device}")
        assert region["status"] == "ok"
        assert "keeper" in region["detail"]
        assert answer.check(f"memory {device}")["status"] == "ok"
    if platform.name == "fake-cuda":
        # Nobody else uses its memory, so that the numbers are exact.
        memory = answer.check(f"memory {platform.device}")["detail"]
        assert "a region of 2 MiB cost 2 MiB" in memory
        assert "came back" in memory
    assert answer.check("control round trip")["detail"].endswith("of 200 pings")
    assert "handle" not in daemon.log
    # Nothing of it stays.
    status = daemon.wait_for_status(lambda status: len(status.sessions) == 1)
    assert not status.components
    assert not any(device.regions for device in status.devices)


def test_ranks_are_part_of_the_proof(platform: Platform, tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--ranks", "1", device=platform.option) as daemon:
        answer = health_check(daemon.runtime_dir, "--wait", "ready", "--timeout", "60")
        assert answer.code == 0
        assert "rank0" in answer.check(f"region {platform.device}")["detail"]
        assert answer.check("ranks")["detail"] == "1 ready"
        # The rank is a client, too, and says which torch it has.
        assert "rank0" in answer.check("clients")["detail"]
        assert "torch" in answer.check("clients")["detail"]


def test_wait_ready_waits_for_a_daemon_that_comes(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    arguments = ("ipc", "health-check", "--json", "--wait", "ready", "--timeout", "30")
    with subprocess.Popen(
        command(*arguments, "--runtime-dir", str(daemon.runtime_dir)), stdout=subprocess.PIPE
    ) as waiting:
        try:
            daemon.start()
            output, _ = waiting.communicate(timeout=40)
        finally:
            waiting.kill()
            daemon.close()
    assert waiting.returncode == 0
    assert json.loads(output)["ok"]


def test_plain_text_has_no_colours(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        arguments = ("ipc", "health-check", "--runtime-dir", str(daemon.runtime_dir))
        answer = run_command(*arguments, environment={"FORCE_COLOR": "1", "COLUMNS": "40"})
    assert answer.code == 0
    assert "\x1b" not in answer.output
    assert answer.output.splitlines()[-1] == "healthy"
    assert any(line.startswith("ok    region cpu: ") for line in answer.output.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--timeout", "soon"),
        ("--timeout", "0"),
        ("--wait", "forever"),
        ("--nonsense",),
        ("too", "many"),
        ("--json", "--runtime-dir", "/tmp/" + "x" * 120),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    answer = run_command("ipc", "health-check", *arguments)
    assert answer.code == 2
    if "--json" in arguments:
        assert answer.report["checks"][0]["status"] == "fail"


@pytest.mark.allow_leaks("pyzmq keeps one thread per process for frames sent without a copy")
def test_the_library_works_in_process_and_stays_light(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        assert run_checks(daemon.runtime_dir).ok
        before = leaks.Snapshot.take()
        report = run_checks(daemon.runtime_dir, timeout=20, host="ComfyUI 0.0", dynamic_vram=True)
        assert report.ok
        assert not leaks.find_leaks(before)
        code = f"""
import sys
from xdit_sidecar.protocol.health.runner import run_checks
assert run_checks({str(daemon.runtime_dir)!r}).ok
heavy = {{"torch", "numpy", "typer", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
        subprocess.run([sys.executable, "-c", code], check=True)
