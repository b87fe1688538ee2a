"""``xdit-sidecar generate`` as users run it: with ComfyUI's tokenizers, tiny models, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_files
import pytest
from comfyui_checkout import comfyui
from command_scene import Commands, evict_all, whole_checkpoint
from daemon_process import running_daemon
from health_command import command as command_line
from health_command import run_command
from network_watch import NetworkWatch
from picture_scene import Pipeline, PipelineFiles
from PIL import Image
from ranks.components.component_files import T5
from ranks_scene import RanksScene
from safetensors.torch import save_file
from xdit_sidecar.daemon.commands.generate import Lora, _adapters, parse_lora
from xdit_sidecar.protocol import messages as m

# As large as the tokenizers of ComfyUI need it.
PIPELINE = Pipeline(t5=T5(layers=1, vocabulary=32128))
SMALL = ("--size", "64x48", "--steps", "2")


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> NetworkWatch:
    return NetworkWatch.begin(tmp_path_factory.mktemp("network") / "watch")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, watch: NetworkWatch) -> Iterator[RanksScene]:
    """Two ranks, watched for uses of the network."""
    directory = tmp_path_factory.mktemp("generate-scene")
    with running_daemon(directory, "--ranks", "2", environment=watch.environment) as daemon:
        running = RanksScene(daemon, directory)
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PipelineFiles:
    return PIPELINE.write(tmp_path_factory.mktemp("generate-files"))


@pytest.fixture
def command(scene: RanksScene, capsys: pytest.CaptureFixture[str]) -> Commands:
    """Nothing is resident yet."""
    evict_all(scene.daemon)
    return Commands(scene.daemon.runtime_dir, capsys)


def arguments(files: PipelineFiles | None, out: Path, *more: str | Path) -> list[str | Path]:
    models = (
        [piece for path in files.paths.values() for piece in ("--model", path)] if files else []
    )
    fixed = ["generate", "--prompt", "a red fox", "--out", out, "--tokenizers", comfyui()]
    return [*fixed, *models, *SMALL, *more]


def about(path: Path) -> dict[str, Any]:
    """What a picture says of itself."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (64, 48)
        return json.loads(image.text["xdit-sidecar"])  # type: ignore[attr-defined]


def test_a_picture_with_nothing_from_a_network(
    scene: RanksScene, files: PipelineFiles, watch: NetworkWatch, tmp_path: Path
) -> None:
    out = tmp_path / "fox.png"
    # As if there were a hub that may be asked.
    environment = {**watch.environment, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    given = map(str, arguments(files, out, "--seed", "7"))
    answer = run_command(
        *given, "--runtime-dir", str(scene.daemon.runtime_dir), environment=environment
    )
    assert answer.code == 0, answer.errors
    assert answer.errors == ""
    assert answer.output.startswith(f"{out}: 64 x 48, seed 7, ")
    assert about(out)["prompt"] == "a red fox"
    assert watch.attempts == []
    for process in (" serve ", "daemon.ranks --", "daemon.keeper", " generate "):
        assert any(process in line for line in watch.processes), process


def test_the_watch_notices(tmp_path: Path) -> None:
    watch = NetworkWatch.begin(tmp_path / "watch")
    for code in (
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "import urllib.request as u; u.urlopen('https://example.invalid/', timeout=1)",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **watch.environment},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 1
    assert len(watch.processes) == 2
    assert ["192.0.2.1" in line for line in watch.attempts] == [True, False]


def test_a_seed_is_a_picture(command: Commands, files: PipelineFiles, tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.png" for name in ("one", "two", "other"))
    said = command.succeed(*arguments(files, one, "--seed", "5"))
    assert said.startswith(f"{one}: 64 x 48, seed 5, ")
    # The second time from what is resident, with no file named.
    command.succeed(*arguments(None, two, "--seed", "5"))
    assert one.read_bytes() == two.read_bytes()
    settings = about(one)
    assert settings == {
        **{"prompt": "a red fox", "negative": "", "seed": 5, "steps": 2, "cfg": 1.0},
        **{"guidance": 3.5, "sampler": "euler", "scheduler": "simple", "loras": []},
    }
    command.succeed(*arguments(None, other))
    assert about(other)["seed"] != 5
    assert other.read_bytes() != one.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([one, two, other])


def test_all_that_can_be_chosen(command: Commands, files: PipelineFiles, tmp_path: Path) -> None:
    plain, chosen = tmp_path / "plain.png", tmp_path / "chosen.png"
    command.succeed(*arguments(files, plain, "--seed", "5"))
    lora = tmp_path / "style.safetensors"
    save_file(lora_files.kohya(PIPELINE.flux), lora)
    for options in (
        ("--lora", f"{lora}:0.7"),
        ("--cfg", "2.5", "--negative", "blurred"),
        ("--sampler", "heun", "--scheduler", "normal"),
        ("--guidance", "1.0"),
        ("--compute", "bf16"),
    ):
        command.succeed(*arguments(files, chosen, "--seed", "5", *options))
        assert chosen.read_bytes() != plain.read_bytes()
    for parallel in ("ulysses=2", "ring=2", "pipefusion=2"):
        command.succeed(*arguments(files, chosen, "--seed", "5", "--parallel", parallel))


def test_lora_strengths() -> None:
    assert parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_lora("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    assert parse_lora("odd:name.safetensors") == (Path("odd:name.safetensors"), 1.0)


def test_a_lora_that_is_named_twice_works_twice() -> None:
    def copies(fingerprint: str) -> list[Any]:  # on two devices
        component = SimpleNamespace(fingerprint=fingerprint)
        return [SimpleNamespace(attachment=SimpleNamespace(component=component))] * 2

    named = [("a", 0.5), ("b", 1.0), ("a", 0.25)]
    found = _adapters([(copies(name), Lora(Path(name), strength)) for name, strength in named])
    assert found == [m.Adapter("a", 0.75), m.Adapter("b", 1.0)]


def test_a_whole_checkpoint(command: Commands, tmp_path: Path) -> None:
    parts = PIPELINE.tensors(seed=4)
    path = whole_checkpoint(tmp_path / "all.safetensors", **parts)
    command.succeed(*arguments(None, tmp_path / "fox.png", "--model", path))
    assert len(command.succeed("unload", "all.safetensors").splitlines()) == 4


# --- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--sampler", "lms"), "--sampler lms: use one of euler, ddim, heun, dpmpp_2m"),
        (("--scheduler", "karras"), "--scheduler karras: use one of simple, normal, sgm_uniform"),
        (("--parallel", "ulysses"), "write for example ulysses=2,cfg=2; there are ulysses, ring"),
        (("--parallel", "tensor=2"), "write for example ulysses=2,cfg=2"),
        (("--parallel", "ulysses=4"), "the product of the degrees must be 2, the ranks"),
        (("--size", "100x64"), "is no picture size"),
        (("--compute", "F8"), "'F8' is no dtype to compute in; use F32, F16 or BF16"),
        (("--steps", "0"), "Invalid value for '--steps'"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--out", "fox.jpg"), "--out fox.jpg: pictures are saved as .png"),
    ],
)
def test_wrong_usage(
    command: Commands, tmp_path: Path, options: tuple[str, str], sentence: str
) -> None:
    code, out, err = command(*arguments(None, tmp_path / "fox.png", *options))
    assert (code, out) == (2, "")
    plain = " ".join(err.split())
    assert sentence in plain
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to(command: Commands, tmp_path: Path) -> None:
    refusal = command.refused(*arguments(None, tmp_path / "nowhere" / "fox.png"))
    assert "nowhere': No such file or directory; choose another place with --out" in refusal
    (tmp_path / "folder.png").mkdir()
    refusal = command.refused(*arguments(None, tmp_path / "folder.png"))
    assert "folder.png': it is a folder; choose another name with --out" in refusal


def test_tokenizers(command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["generate", "--prompt", "fox", "--out", tmp_path / "fox.png", *SMALL]
    monkeypatch.delenv("XDIT_SIDECAR_TOKENIZERS", raising=False)
    code, _, err = command(*given)
    assert code == 2
    plain = " ".join(err.split())
    assert "--tokenizers or XDIT_SIDECAR_TOKENIZERS; nothing is downloaded" in plain
    refusal = command.refused(*given, "--tokenizers", tmp_path)
    assert f"no tokenizers in '{tmp_path}': name the folder of ComfyUI" in refusal
    monkeypatch.setenv("XDIT_SIDECAR_TOKENIZERS", str(tmp_path / "nowhere"))
    assert "is no folder" in command.refused(*given)


def test_what_is_not_resident(command: Commands, files: PipelineFiles, tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    refusal = command.refused(*arguments(None, out, "--model", files.paths["transformer"]))
    assert "which vae shall draw? none is resident: name its file with --model" in refusal
    for role in ("vae", "clip_l", "t5"):
        command.succeed("load", files.paths[role])
    command.succeed(*arguments(None, out, "--seed", "5"))
    other = PIPELINE.write(tmp_path, "other", seed=9)
    command.succeed("load", other.paths["vae"])
    refusal = command.refused(*arguments(None, out))
    assert "other-vae.safetensors, tiny-vae.safetensors are resident" in refusal
    command.succeed(*arguments(None, out, "--model", other.paths["vae"]))
    refusal = command.refused(*arguments(None, out, "--model", tmp_path / "none.safetensors"))
    assert "does not exist: check the path" in refusal


def test_without_ranks_nothing_is_loaded(
    files: PipelineFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_daemon(tmp_path) as daemon:
        command = Commands(daemon.runtime_dir, capsys)
        refusal = command.refused(*arguments(files, tmp_path / "fox.png"))
        assert "it was configured with ranks = 0" in refusal
        with daemon.client() as client:
            assert client.status().components == []


def test_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = Commands(tmp_path, capsys).refused(*arguments(None, tmp_path / "fox.png"), code=3)
    assert "no xdit-sidecar daemon answers in " in refusal


def test_ctrl_c(scene: RanksScene, files: PipelineFiles, tmp_path: Path) -> None:
    given = map(str, arguments(files, tmp_path / "fox.png", "--steps", "10000"))
    process = subprocess.Popen(
        [*command_line(*given), "--runtime-dir", str(scene.daemon.runtime_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        scene.daemon.wait_for_status(lambda s: s.group.jobs, 60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    scene.wait_until_idle()
    assert not list(tmp_path.iterdir())
    assert scene.starts == 1
