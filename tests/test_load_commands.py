"""``xdit-sidecar load`` and ``unload`` as users run them; what is refused disturbs nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import lora_files
import pytest
import refused_files
import torch
from command_scene import Commands, evict_all, whole_checkpoint
from flux_inputs import comfy_inputs
from health_command import run_command
from picture_scene import TINY, PipelineFiles
from ranks_scene import SMALL, RanksScene, running_ranks
from safetensors.torch import save_file
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.protocol import messages as m

LOAD, UNLOAD = "load", "unload"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RanksScene]:
    """One rank is enough."""
    with running_ranks(tmp_path_factory.mktemp("load-scene"), 1) as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PipelineFiles:
    return TINY.write(tmp_path_factory.mktemp("load-files"))


@pytest.fixture
def command(scene: RanksScene, capsys: pytest.CaptureFixture[str]) -> Iterator[Commands]:
    yield Commands(scene.daemon.runtime_dir, capsys)
    evict_all(scene.daemon)


def resident(scene: RanksScene) -> list[m.ComponentStatus]:
    return scene.status.components


# --- load


@pytest.mark.parametrize("role", ["transformer", "vae", "clip_l", "t5"])
def test_each_kind_of_file(
    scene: RanksScene, command: Commands, files: PipelineFiles, role: str
) -> None:
    path = files.paths[role]
    out = command.succeed(LOAD, path)
    assert out.startswith(f"{role}: {path.name} on cpu, ")
    assert out.endswith("MiB, loaded\n")
    (component,) = resident(scene)
    assert (component.role, component.label, component.state) == (role, path.name, "resident")
    assert component.sessions == []
    assert command.succeed(LOAD, path).endswith(", was resident already\n")


def test_a_lora(scene: RanksScene, command: Commands, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(lora_files.kohya(SMALL), path)
    assert command.succeed(LOAD, path).startswith("lora: style.safetensors on cpu, ")
    assert [component.role for component in resident(scene)] == ["lora"]


def test_what_is_resident_is_not_read_again(command: Commands, files: PipelineFiles) -> None:
    path = files.paths["transformer"]
    weights = sum(tensor.nbytes for tensor in files.tensors("transformer").values())
    for bytes_read in (weights, 0):
        (part,) = json.loads(command.succeed(LOAD, path, "--json"))["components"]
        assert part["bytes_read"] == bytes_read
        assert (part["role"], part["label"], part["device"]) == ("transformer", path.name, "cpu")
        assert part["fingerprint"].startswith("file:")
        assert part["nbytes"] >= weights


@pytest.mark.parametrize("vae", ["first_stage_model.", "vae."])
def test_a_whole_checkpoint(scene: RanksScene, command: Commands, tmp_path: Path, vae: str) -> None:
    path = whole_checkpoint(tmp_path / "all.safetensors", vae)
    roles = ["transformer", "vae", "clip_l", "t5"]
    lines = command.succeed(LOAD, path).splitlines()
    assert [line.partition(":")[0] for line in lines] == roles
    # By their names without the prefixes, and nothing of the file twice.
    by_role = {component.role: component for component in resident(scene)}
    assert list(by_role) == roles
    total = sum(component.nbytes for component in by_role.values())
    assert total < path.stat().st_size + len(roles) * (2 << 20)


def test_one_part_of_a_checkpoint(scene: RanksScene, command: Commands, tmp_path: Path) -> None:
    path = whole_checkpoint(tmp_path / "all.safetensors")
    assert command.succeed(LOAD, path, "--role", "t5").startswith("t5: all.safetensors")
    assert [component.role for component in resident(scene)] == ["t5"]
    code, _, err = command(LOAD, path, "--role", "unet")
    assert code == 2
    assert "transformer" in err


def test_both_text_encoders_in_one_file(
    scene: RanksScene, command: Commands, tmp_path: Path
) -> None:
    # Names that begin with "text_encoders." are those of LoRAs for text encoders, too.
    path, parts = tmp_path / "texts.safetensors", TINY.tensors()
    prefixes = {"clip_l": "text_encoders.clip_l.", "t5": "text_encoders.t5xxl."}
    tensors = {
        f"{prefix}transformer.{name}": tensor
        for role, prefix in prefixes.items()
        for name, tensor in parts[role].items()
    }
    save_file(tensors, path)
    assert len(command.succeed(LOAD, path).splitlines()) == 2
    assert [component.role for component in resident(scene)] == ["clip_l", "t5"]
    assert "tensors for text encoders only" in command.refused(LOAD, path, "--role", "lora")


def test_another_device(command: Commands, files: PipelineFiles) -> None:
    path = files.paths["t5"]
    assert "on cpu" in command.succeed(LOAD, path, "--device", "cpu")
    code, _, err = command(LOAD, path, "--device", "GPU-0")
    assert code == 2
    assert "the daemon does not serve it; it serves cpu" in " ".join(err.split())


# --- what is refused


@pytest.mark.parametrize("make", refused_files.REFUSED, ids=lambda make: make.__name__)
def test_refused_files(
    scene: RanksScene, command: Commands, tmp_path: Path, make: Callable[[Path], str]
) -> None:
    path = tmp_path / "file.safetensors"
    sentence = make(path)
    inputs = comfy_inputs(SMALL)
    with scene.user() as user:
        before = user.forward(inputs)
        refusal = command.refused(LOAD, path)
        assert (
            refusal.startswith("xdit-sidecar: 'file.safetensors' ") or make is refused_files.missing
        )
        assert sentence in refusal
        if make not in (refused_files.missing, refused_files.directory):
            assert "supported" in refusal or "again" in refusal or "uid" in refusal
        assert [component.role for component in resident(scene)] == ["transformer"]
        assert torch.equal(user.forward(inputs), before)
    code, out, err = command(LOAD, path, "--json")
    assert (code, err) == (1, "")
    error = json.loads(out)["error"]
    assert error["code"] in ("bad-file", "unsupported-model")
    assert f"xdit-sidecar: {error['message']}\n" == refusal


def test_the_other_parts_of_a_broken_checkpoint_can_be_loaded(
    command: Commands, tmp_path: Path
) -> None:
    path = tmp_path / "all.safetensors"
    refused_files.checkpoint_with_a_broken_part(path)
    assert "can be loaded by role: transformer, clip_l, t5" in command.refused(LOAD, path)
    assert "loaded" in command.succeed(LOAD, path, "--role", "transformer")
    assert "incomplete" in command.refused(LOAD, path, "--role", "vae")


def test_the_wrong_role(command: Commands, files: PipelineFiles) -> None:
    refusal = command.refused(LOAD, files.paths["t5"], "--role", "vae")
    assert "is a text encoder, not a VAE; supported are VAEs" in refusal


def test_without_a_daemon(tmp_path: Path, files: PipelineFiles) -> None:
    for arguments in ((LOAD, str(files.paths["t5"])), (UNLOAD, "--all")):
        answer = run_command(*arguments, "--runtime-dir", str(tmp_path))
        assert answer.code == 3
        assert answer.errors.startswith("xdit-sidecar: no xdit-sidecar daemon answers in ")


# --- unload


def test_unload_by_name_role_and_fingerprint(
    scene: RanksScene, command: Commands, files: PipelineFiles
) -> None:
    path = files.paths["t5"]
    (loaded,) = json.loads(command.succeed(LOAD, path, "--json"))["components"]
    kind, _, digest = loaded["fingerprint"].partition(":")
    # The third is what `status` shows.
    for name in (path.name, "t5", f"{kind}:{digest[:12]}", digest[:6], loaded["fingerprint"]):
        command.succeed(LOAD, path)
        out = command.succeed(UNLOAD, name)
        assert out == f"t5: {path.name} on cpu, 2 MiB freed\n"
        assert resident(scene) == []
    command.succeed(LOAD, path)
    for name in (digest[:5], "nothing", "file:", path.stem):
        refusal = command.refused(UNLOAD, name)
        assert f"no resident component is called {name!r}; resident: {path.name}" in refusal
    command.succeed(UNLOAD, "t5")
    assert "resident: nothing" in command.refused(UNLOAD, "t5")


def test_unload_several(scene: RanksScene, command: Commands, files: PipelineFiles) -> None:
    for role in ("t5", "vae"):
        command.succeed(LOAD, files.paths[role])
    # Named twice, freed once; nothing is freed if one is unknown.
    command.refused(UNLOAD, "t5", "nothing")
    assert len(resident(scene)) == 2
    name = files.paths["t5"].name
    assert len(command.succeed(UNLOAD, "t5", name, "vae").splitlines()) == 2
    assert resident(scene) == []


def test_what_is_in_use_stays(scene: RanksScene, command: Commands, files: PipelineFiles) -> None:
    command.succeed(LOAD, files.paths["t5"])
    with scene.user(name="ComfyUI") as user:
        refusal = command.refused(UNLOAD, "transformer")
        assert f"small.safetensors on cpu is used by ComfyUI (pid {os.getpid()}): close" in refusal
        command.refused(UNLOAD, "t5", "transformer")  # and nothing is freed
        assert len(resident(scene)) == 2
        out = command.succeed(UNLOAD, "--all")
        assert out.splitlines() == [f"t5: {files.paths['t5'].name} on cpu, 2 MiB freed"]
        assert command.succeed(UNLOAD, "--all") == "nothing that is resident is unused\n"
        assert user.forward(comfy_inputs(SMALL)).isfinite().all()
    assert "transformer" in command.succeed(UNLOAD, "--all")


def test_unload_wants_to_know_what(command: Commands) -> None:
    for arguments in ((), ("t5", "--all")):
        code, out, err = command(UNLOAD, *arguments)
        assert (code, out) == (2, "")
        assert "name what to unload, or give --all" in err


# --- what the commands say of themselves


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("load", "wherever the ranks work"),
        ("generate", "what is resident"),
        ("plan", "this machine's"),
        ("serve", "all but the reserve"),
    ],
)
def test_help_tells_the_defaults(
    capsys: pytest.CaptureFixture[str], name: str, default: str
) -> None:
    assert run([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"Usage: xdit-sidecar {name} ")
    assert f"[default: {default}]" in text
