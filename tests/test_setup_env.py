"""`make setup` picks the torch that fits the machine."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import urllib.error
from types import ModuleType
from typing import Any

import project
import pytest


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("XDIT_TORCH_SPEC", raising=False)
    path = project.ROOT / "tools/setup_env.py"
    spec = importlib.util.spec_from_file_location("setup_env", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Driver:
    """Stands in for libcuda: two calls that fill in a number, one that only succeeds or fails."""

    def __init__(self, initialised: int, devices: int, version: int) -> None:
        self.initialised, self.devices, self.version = initialised, devices, version

    def cuInit(self, flags: int) -> int:
        return self.initialised

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.devices
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0


@pytest.mark.parametrize(
    ("driver", "answer"),
    [
        (Driver(0, 1, 12080), (12, 8)),
        (Driver(0, 8, 13000), (13, 0)),
        (Driver(0, 0, 12080), None),
        (Driver(999, 1, 12080), None),
        (None, None),
    ],
    ids=["12.8", "13.0", "no device", "does not start", "no library"],
)
def test_driver_is_asked(
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None,
    answer: tuple[int, int] | None,
) -> None:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(setup_env.ctypes, "CDLL", load)
    assert setup_env.driver_version() == answer


@pytest.mark.parametrize(
    ("driver", "builds"),
    [
        (None, ["cpu"]),
        ((12, 4), ["cu124"]),
        ((12, 8), ["cu128", "cu126", "cu124"]),
        ((13, 0), ["cu130", "cu129", "cu128", "cu126", "cu124"]),
        ((11, 8), []),
    ],
)
def test_builds_that_the_driver_runs(
    setup_env: ModuleType, driver: tuple[int, int] | None, builds: list[str]
) -> None:
    assert setup_env.wanted_builds(driver) == builds


def test_newest_build_on_offer_is_taken(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env, "index_has", lambda build, _: build == "cu126")
    assert setup_env.torch_arguments((12, 8), "2.13.0") == [
        "torch==2.13.0+cu126",
        "--index-url",
        f"{setup_env.TORCH_INDEX}/cu126",
    ]


def test_without_pytorchs_index_the_configured_one_is_used(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "index_has", lambda *_: None)
    assert setup_env.torch_arguments(None, "2.13.0") == ["torch==2.13.0"]
    assert "does not answer" in capsys.readouterr().out


def test_the_user_may_pick_torch(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDIT_TORCH_SPEC", "torch==2.11.0 --index-url https://example.org/x")
    assert setup_env.torch_arguments(None, "2.13.0") == [
        "torch==2.11.0",
        "--index-url",
        "https://example.org/x",
    ]


def test_index_page_is_read_for_this_interpreter(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    machine = setup_env.platform.machine()
    page = f'<a href="x/torch-9.9.9%2Bcpu-{tag}-{tag}-manylinux_2_28_{machine}.whl">'

    def answer(url: str, timeout: float) -> io.BytesIO:
        assert url == f"{setup_env.TORCH_INDEX}/cpu/torch/"
        assert timeout <= 5
        return io.BytesIO(page.encode())

    monkeypatch.setattr(setup_env.urllib.request, "urlopen", answer)
    assert setup_env.index_has("cpu", "9.9.9") is True
    assert setup_env.index_has("cpu", "9.9.8") is False


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (urllib.error.URLError("no route"), None),
        (TimeoutError(), None),
        (urllib.error.HTTPError("", 403, "", None, None), False),  # type: ignore[arg-type]
    ],
)
def test_index_that_fails(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, error: OSError, answer: bool | None
) -> None:
    def fail(url: str, timeout: float) -> None:
        raise error

    monkeypatch.setattr(setup_env.urllib.request, "urlopen", fail)
    assert setup_env.index_has("cpu", "9.9.9") is answer


def test_driver_question_is_answered(setup_env: ModuleType) -> None:
    answer = subprocess.run(
        [sys.executable, setup_env.__file__, "--driver"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "none" or float(answer.stdout)


def test_versions_are_read_from_one_file(setup_env: ModuleType) -> None:
    versions = setup_env.tested_versions()
    assert {"torch", "setuptools", "pytest"} <= set(versions)


def test_every_extra_is_installed(setup_env: ModuleType) -> None:
    described = project.pyproject()["project"]["optional-dependencies"]
    assert sorted(setup_env.EXTRAS) == sorted(described)


@pytest.mark.parametrize(
    ("uid", "ci", "present", "asked"),
    [
        (0, "", {"apt-get"}, ["update", "chromium-driver"]),
        (0, "", {"apt-get", "chromium"}, ["update", "chromium-driver"]),
        (0, "", {"apt-get", "chromium", "chromedriver"}, []),
        (0, "true", {"apt-get"}, ["update", "chromium-driver", "systemd", "g++"]),
        (0, "true", {"apt-get", "chromium", "chromedriver", "g++"}, ["update", "systemd"]),
        (1000, "true", {"apt-get"}, []),
        (0, "true", set(), []),
    ],
    ids=["missing", "no driver", "there", "in CI", "half in CI", "not root", "not Debian"],
)
def test_tools_are_installed_where_they_may_be(
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    ci: str,
    present: set[str],
    asked: list[str],
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: uid)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(setup_env.subprocess, "run", run)
    setup_env.provide_tools()
    assert commands == asked


def test_no_tool_is_no_failure(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "E: no network")

    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: name if name == "apt-get" else None)
    monkeypatch.setattr(setup_env.subprocess, "run", run)
    setup_env.provide_tools()
    out = capsys.readouterr().out
    assert out.count("E: no network") == 3
    assert "no systemd, so the tests of the units will be skipped" in out
