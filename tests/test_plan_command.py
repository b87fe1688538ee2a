"""``xdit-sidecar plan``: for this machine or one that is described, for people and programs."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import flux_files
import pytest
from flux_files import DEV, Flux
from health_command import run_command
from xdit_sidecar.daemon import gpus
from xdit_sidecar.daemon.commands import plan as plan_module
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.daemon.gpus import Gpu, Links

GIB = 1 << 30
H200 = Gpu("NVIDIA H200", 141 * GIB, 140 * GIB)


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """FLUX.1-dev, all header."""
    path = tmp_path / "flux1-dev.safetensors"
    flux_files.write_hollow(path, flux_files.entries_of(DEV))
    return path


def set_machine(monkeypatch: pytest.MonkeyPatch, *found: Gpu, links: Links = "nvlink") -> None:
    uuids = [f"GPU-{number}" for number in range(len(found))]
    monkeypatch.setattr(plan_module, "discover_gpus", lambda: (uuids, "no driver"))
    monkeypatch.setattr(plan_module, "read_gpus", lambda asked: [*found[: len(asked)]])
    monkeypatch.setattr(plan_module, "read_links", lambda asked: links)


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """(exit status, the JSON)."""
    code = run(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_described_machine(dev: Path) -> None:
    answer = run_command("plan", str(dev), "--gpus", "2", "--memory", "48GiB")
    assert answer.code == 0, answer.errors
    lines = answer.output.splitlines()
    assert lines[0] == (
        "FLUX.1 dev or Kontext, bf16: 1024x1024, 512 text tokens, batch 1, 2 ranks (ulysses2)"
    )
    assert lines[-1] == "fits"
    assert "\x1b" not in answer.output
    (header,) = (line for line in lines if line.startswith("gpu"))
    titles = "gpu name total free weights vae, text activations contexts reserve needed left"
    assert header.split() == titles.split()
    assert len([line for line in lines if "assumed GPU  48 GiB  48 GiB" in line]) == 2
    for about in ("dtype", "degrees", "links", "VAE and text encoders"):
        assert len([line for line in lines if line.startswith(f"{about}: ")]) == 1


def test_what_does_not_fit_fails_and_says_what_would(dev: Path) -> None:
    answer = run_command("plan", str(dev), "--gpus", "1", "--memory", "24GiB")
    assert answer.code == 1
    assert "does not fit: 10.5 GiB are missing" in answer.output
    options = [line for line in answer.output.splitlines() if line.startswith("  -> ")]
    assert len(options) >= 3
    assert all(": saves " in option for option in options)
    assert options[-1].endswith("then it fits")


def test_nothing_would_help(dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dev.with_name("fp8.safetensors")
    flux_files.write_hollow(path, flux_files.entries_of(DEV, "F8_E4M3"))
    options = ("--gpus", "1", "--memory", "8G", "--size", "256x256", "--text-encoders", "cpu")
    assert run(["plan", str(path), *options]) == 1
    assert "  -> nothing that is known here would save memory" in capsys.readouterr().out


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    answer = run_command("plan", str(path), "--gpus", "1", "--memory", "24GiB")
    assert answer.code == 1
    assert not answer.output
    assert answer.errors.startswith("xdit-sidecar: 'model.gguf' is a GGUF file: ")


def test_errors_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = ask(capsys, str(tmp_path / "none"), "--gpus", "1", "--memory", "8G")
    assert code == 1
    assert answer["error"]["code"] == "bad-file"
    path = tmp_path / "vae.safetensors"
    flux_files.write_hollow(path, {"decoder.conv_in.weight": ("BF16", (2, 2))})
    code, answer = ask(capsys, str(path), "--gpus", "1", "--memory", "8G")
    assert code == 1
    assert answer["error"]["code"] == "unsupported-model"
    assert "is a VAE, not a transformer" in answer["error"]["message"]


def test_json_has_everything(dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--gpus", "2", "--memory", "36GiB", "--size", "768x1344", "--text", "256")
    code, found = ask(capsys, str(dev), *options, "--batch", "2", "--text-encoders", "cpu")
    assert code == 0
    assert found["request"] == {
        "width": 768,
        "height": 1344,
        "text": 256,
        "batch": 2,
        "encoders_on_gpu": False,
    }
    assert found["degrees"] == {"ulysses": 1, "ring": 1, "cfg": 2, "pipefusion": 1}
    assert (found["dtype"], found["compute"], found["fits"]) == ("BF16", "BF16", True)
    assert found["options"] == []
    assert len(found["gpus"]) == 2
    assert found["gpus"][0]["free"] == 36 * GIB
    code, found = ask(capsys, str(dev), "--memory", "8GiB", "--gpus", "1")
    assert code == 1
    assert {"what", "saves", "fits"} == found["options"][0].keys()


def test_this_machine(
    dev: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Gpu("NVIDIA RTX", 48 * GIB, 40 * GIB)
    set_machine(monkeypatch, H200, small)
    code, found = ask(capsys, str(dev))
    assert code == 0
    assert found["links"] == "nvlink"
    assert [gpu["name"] for gpu in found["gpus"]] == ["NVIDIA H200", "NVIDIA RTX"]
    assert [gpu["free"] for gpu in found["gpus"]] == [140 * GIB, 40 * GIB]
    _, found = ask(capsys, str(dev), "--gpus", "1")
    assert [gpu["name"] for gpu in found["gpus"]] == ["NVIDIA H200"]
    _, found = ask(capsys, str(dev), "--gpus", "4")
    assert len(found["gpus"]) == 4
    assert found["links"] == "unknown"
    assert [gpu["name"] for gpu in found["gpus"]].count("NVIDIA H200 (assumed)") == 2
    _, found = ask(capsys, str(dev), "--memory", "80GiB")
    assert [gpu["total"] for gpu in found["gpus"]] == [80 * GIB] * 2


def test_a_machine_without_gpus(
    dev: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_machine(monkeypatch)
    for options in ([], ["--gpus", "2"]):
        assert run(["plan", str(dev), *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("xdit-sidecar: no GPU to plan for: no driver; describe one")
    code, found = ask(capsys, str(dev), "--memory", "80GiB")
    assert code == 0
    assert len(found["gpus"]) == 1
    monkeypatch.setattr(plan_module, "discover_gpus", lambda: (["GPU-0"], ""))
    assert run(["plan", str(dev)]) == 2
    assert "NVML (libnvidia-ml.so.1) does not tell their memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--size", "1024"),
        ("--size", "1024x1000"),
        ("--size", "0x1024"),
        ("--size", "99999x16"),
        ("--memory", "lots"),
        ("--gpus", "0"),
        ("--batch", "0"),
        ("--text-encoders", "disk"),
    ],
)
def test_wrong_usage(
    dev: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(dev), "--gpus", "1", "--memory", "24GiB", *options]) == 2
    assert not capsys.readouterr().out


def test_a_small_model_is_planned_without_text_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    flux_files.write_hollow(path, flux_files.entries_of(Flux()))
    code, found = ask(capsys, str(path), "--gpus", "2", "--memory", "4GiB")
    assert code == 0
    assert {gpu["companions"] for gpu in found["gpus"]} == {0}


# --- what NVML tells


class FakeNvml:
    """NVML's C functions, for GPUs GPU-0, GPU-1, …; ``p2p`` answers (one, other, asked)."""

    def __init__(self, count: int = 2, broken: str = "", p2p: dict[int, int] | None = None) -> None:
        self.count, self.broken = count, broken
        self.p2p = p2p or {}
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 9 if self.broken == "init" else 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        number = int(uuid.removeprefix(b"GPU-"))
        device._obj.value = number + 1
        return 0 if number < self.count else 6

    def nvmlDeviceGetName(self, device: ctypes.c_void_p, name: Any, length: int) -> int:
        name.value = f"card {device.value}".encode()
        return 9 if self.broken == "name" else 0

    def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 80 * GIB, 60 * GIB, 20 * GIB
        return 9 if self.broken == "memory" else 0

    def nvmlDeviceGetP2PStatus(self, one: Any, other: Any, asked: int, status: Any) -> int:
        assert one.value != other.value
        status._obj.value = self.p2p.get(asked, 0)
        return 9 if self.broken == "p2p" else 0


def use(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: nvml)


def test_memory_and_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    use(monkeypatch, nvml)
    found = gpus.read_gpus(["GPU-1", "GPU-7", "GPU-0"])
    assert found == [Gpu("card 2", 80 * GIB, 60 * GIB), Gpu("card 1", 80 * GIB, 60 * GIB)]
    assert nvml.open == 0


@pytest.mark.parametrize("broken", ["init", "name", "memory"])
def test_a_broken_nvml_tells_of_no_gpu(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    use(monkeypatch, FakeNvml(broken=broken))
    assert gpus.read_gpus(["GPU-0"]) == []


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_LIBRARY", "libno-such-library.so.1")
    assert gpus.read_gpus(["GPU-0"]) == []
    assert gpus.read_links(["GPU-0", "GPU-1"]) == "unknown"


@pytest.mark.parametrize(
    ("nvml", "asked", "expected"),
    [
        (FakeNvml(), 2, "nvlink"),
        (FakeNvml(p2p={2: 3}), 2, "peer"),
        (FakeNvml(p2p={0: 1, 2: 1}), 2, "none"),
        (FakeNvml(broken="p2p"), 2, "unknown"),
        (FakeNvml(), 3, "unknown"),
        (FakeNvml(), 1, "unknown"),
    ],
)
def test_links_between_gpus(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, asked: int, expected: Links
) -> None:
    use(monkeypatch, nvml)
    assert gpus.read_links([f"GPU-{number}" for number in range(asked)]) == expected
