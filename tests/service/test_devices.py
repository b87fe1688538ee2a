"""Which devices are served, and what a daemon without a GPU says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_process import running_daemon
from fake_cuda.build import fake_libcuda
from service.notify_socket import notify_socket
from xdit_sidecar.daemon import devices
from xdit_sidecar.daemon.commands.status import describe_status
from xdit_sidecar.daemon.devices import Found, NoDevice, choose_devices
from xdit_sidecar.protocol.regions.cuda_driver import LIBRARY_VARIABLE


@pytest.mark.parametrize("module", [False, True])
def test_a_library_that_is_not_there(
    module: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    monkeypatch.setattr(devices, "_KERNEL_MODULE", tmp_path if module else tmp_path / "none")
    devices._main()
    told = capsys.readouterr().out
    assert "cannot be loaded" in told
    assert ('"driver": true' in told) is module


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_ask_driver", lambda: Found(["GPU-0", "GPU-1"], ""))
    assert choose_devices("auto") == (("GPU-0", "GPU-1", "cpu"), "")
    assert choose_devices("cuda") == (("GPU-0", "GPU-1", "cpu"), "")
    assert choose_devices("GPU-1") == (("GPU-1", "cpu"), "")
    assert choose_devices("cpu") == (("cpu",), "")
    with pytest.raises(NoDevice, match="choose auto, cpu, cuda or from: GPU-0, GPU-1"):
        choose_devices("GPU-2")
    for driver, reason in ((True, "broken"), (False, "")):
        monkeypatch.setattr(devices, "_ask_driver", lambda found=driver: Found([], "broken", found))
        assert choose_devices("auto") == (("cpu",), reason)
        with pytest.raises(NoDevice, match="no CUDA device: broken"):
            choose_devices("cuda")


def test_a_driver_that_ends_the_one_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.sys, "executable", "/bin/false")
    gpus, reason, driver = devices._ask_driver()
    assert (gpus, reason, driver) == ([], "asking the CUDA driver ended with status 1", True)


def test_a_broken_driver_is_told(tmp_path: Path) -> None:
    with notify_socket(tmp_path / "notify") as manager:
        environment = {
            LIBRARY_VARIABLE: fake_libcuda(),
            "FAKE_CUDA_STATE": str(tmp_path / "state"),
            "FAKE_CUDA_FAIL": "cuInit=999",
            "NOTIFY_SOCKET": manager.address,
        }
        with running_daemon(tmp_path, device="auto", environment=environment) as daemon:
            line = daemon.wait_for_log("no-gpu")
            assert line.startswith("WARNING no-gpu reason=")
            assert "cuInit failed" in line
            assert "cuInit failed" in manager.wait_for("STATUS", "no GPU is served: ")["STATUS"]
            with daemon.client() as client:
                status = client.status()
        assert "cuInit failed" in status.no_gpu
        assert f"no GPU is served: {status.no_gpu}" in describe_status(status, None)


def test_a_machine_without_a_driver_is_no_warning(tmp_path: Path) -> None:
    missing = {LIBRARY_VARIABLE: str(tmp_path / "missing.so")}
    with running_daemon(tmp_path, device="auto", environment=missing) as daemon:
        line = daemon.wait_for_log("no-gpu")
    expected = "WARNING" if devices._KERNEL_MODULE.exists() else "INFO"
    assert line.startswith(f"{expected} no-gpu reason=")
