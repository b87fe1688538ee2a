"""``xdit-sidecar status``: who shares what, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import components
from daemon_process import DaemonProcess, running_daemon
from health_command import run_command
from platforms import Platform, make_platform


def test_status_shows_who_shares_a_component(daemon: DaemonProcess, platform: Platform) -> None:
    sources = components.random_tensors()
    component = components.describe(sources, "shared.safetensors")
    directory = ("--runtime-dir", str(daemon.runtime_dir))
    with (
        daemon.client("first", host="ComfyUI 0.0") as first,
        daemon.client("second", dynamic_vram=True) as second,
    ):
        held = [
            client.hand_over(component, platform.device, lambda w: w.copy_tensors(sources))
            for client in (first, second)
        ]
        shown = run_command("status", *directory)
        told = run_command("status", "--json", *directory)
        for attachment in held:
            attachment.release()
    assert (shown.code, told.code) == (0, 0)
    line = next(line for line in shown.output.splitlines() if "shared.safetensors" in line)
    for word in ("vae", platform.device, "2 MiB", "resident", "(ComfyUI 0.0)", "(second)"):
        assert word in line
    assert "dynamic VRAM is on" in shown.output
    assert "\x1b" not in shown.output
    found = json.loads(told.output)
    assert len(found["components"][0]["sessions"]) == 2
    assert {device["state"] for device in found["devices"]} == {"ready"}


def test_status_without_a_daemon_ends_with_3(tmp_path: Path) -> None:
    directory = ("--runtime-dir", str(tmp_path)[:60])
    shown = run_command("status", *directory)
    assert (shown.code, shown.output) == (3, "")
    assert "xdit-sidecar serve" in shown.errors
    told = run_command("status", "--json", *directory)
    assert told.code == 3
    assert json.loads(told.output)["error"]["code"] == "absent"


def test_status_of_a_failed_device_ends_with_1(tmp_path: Path) -> None:
    fake = make_platform("fake-cuda", tmp_path)
    broken = {**fake.environment, "FAKE_CUDA_FAIL": "cuDevicePrimaryCtxRetain=2"}
    with running_daemon(tmp_path, device="cuda", environment=broken) as daemon:
        shown = run_command("status", "--runtime-dir", str(daemon.runtime_dir))
    assert shown.code == 1
    assert "CUDA_ERROR_OUT_OF_MEMORY" in shown.output


def test_wrong_usage_ends_with_2() -> None:
    assert run_command("status", "--nonsense").code == 2
