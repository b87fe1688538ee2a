"""The commands in the documents do what the documents say, or are at least written as they must be.

A command that `tests/documented_commands.py` does not know fails: say there what is to be done.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import documents
import flux_files
import project
import pytest
import torch
import typer
from command_scene import evict_all
from daemon_process import running_daemon
from digits.files import MODELS, TOKENIZERS
from digits_scene import reader
from documented_commands import BY_FIXTURE, COMMANDS, PROGRAMS, NotRun, Run
from documents import Command
from flux_files import DEV
from picture_scene import Pipeline
from PIL import Image
from ranks.components.component_files import T5
from ranks_scene import RanksScene
from xdit_sidecar.daemon.commands import service as service_module
from xdit_sidecar.daemon.commands.app import app, run
from xdit_sidecar.protocol.endpoints import RUNTIME_DIR_VARIABLE

PAGES = [page for page in map(str, documents.documents()) if documents.commands(page)]
# As large as real tokenizers need it.
PIPELINE = Pipeline(t5=T5(layers=1, vocabulary=32128))
SECONDS = re.compile(r"\b\d+(\.\d+)? s\b")


def key_of(command: Command) -> str:
    """What the table calls it: without the folder that the program is said to lie in."""
    return re.sub(r"(^|\s)[~\w/.-]+/(?=(xdit-sidecar|pip|python3)\s)", r"\1", command.text)


def treatment(command: Command) -> Run | NotRun:
    """What is to be done with a command; fails for one that nobody thought of."""
    found = COMMANDS.get(key_of(command)) or PROGRAMS.get(command.program)
    if found is None:
        pytest.fail(
            f"{command.document} has a command that tests/documented_commands.py does not know: "
            f"{key_of(command)!r}. Say there how it is run, or why it is not",
            pytrace=False,
        )
    return found


# --- what needs no daemon -------------------------------------------------------------------------


def check_words(words: list[str]) -> None:
    """`xdit-sidecar` with these words: its commands and options exist. AssertionError."""
    here = typer.main.get_command(app)
    while words and (inner := getattr(here, "commands", {})) and words[0] in inner:
        here, words = inner[words[0]], words[1:]
    known = {name for p in here.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{here.name} has no option {word}"
    rest = [word for word in words if not word.startswith("-")]
    unknown = getattr(here, "commands", None) and rest
    assert not unknown, f"{here.name} has no command {rest[0]}"


def make_targets() -> set[str]:
    text = documents.read("Makefile")
    return set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))


def check_make(words: list[str]) -> None:
    """Targets exist. AssertionError."""
    targets = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
    unknown = set(targets) - make_targets()
    assert not unknown, f"the Makefile has no target {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_written_rightly(page: str) -> None:
    for command in documents.commands(page):
        treatment(command)
        if command.program == "xdit-sidecar":
            check_words(command.arguments)
        elif command.program == "make":
            check_make(command.arguments)
        elif command.program == "docker":
            check_docker(command.arguments)
        elif command.program == "pip":
            (extra,) = re.findall(r"\[(\w+)\]", command.arguments[-1])
            assert extra in project.pyproject()["project"]["optional-dependencies"]


def check_docker(words: list[str]) -> None:
    """Files exist; what stands behind our image is for `serve`. AssertionError."""
    if words[0] == "build":
        assert (project.ROOT / words[words.index("-f") + 1]).is_file()
    elif "xdit-sidecar" in words:
        check_words(["serve", *words[words.index("xdit-sidecar") + 1 :]])


@pytest.mark.parametrize("page", list(map(str, documents.documents())))
def test_commands_within_sentences_exist(page: str) -> None:
    for code in documents.inline_code(documents.read(page)):
        words = code.split()
        if words[0] == "xdit-sidecar" and len(words) > 1:
            # `a|b` stands for two commands.
            for choice in words[-1].split("|"):
                check_words([word for word in [*words[1:-1], choice] if word != "…"])
        elif words[0] == "make" and len(words) > 1:
            check_make(words[1:])


def test_a_new_command_is_noticed() -> None:
    (command,) = documents.commands("page.md", "```\nxdit-sidecar status --watch\n```\n")
    with pytest.raises(pytest.fail.Exception, match="does not know: 'xdit-sidecar status --watch'"):
        treatment(command)


@pytest.mark.parametrize(
    "words", [["status", "--wacth"], ["ipc", "check"], ["stop"], ["load", "f", "--rank", "1"]]
)
def test_a_command_that_is_not_there_is_noticed(words: list[str]) -> None:
    with pytest.raises(AssertionError):
        check_words(words)


def test_a_target_that_is_not_there_is_noticed() -> None:
    check_make(["bench-gpu"])
    for target in ("everything", "bench-cpu"):
        with pytest.raises(AssertionError, match=f"no target {target}"):
            check_make([target])


def test_the_table_has_nothing_that_no_document_has() -> None:
    found = [command for page in PAGES for command in documents.commands(page)]
    assert set(COMMANDS) == {key_of(c) for c in found if c.program not in PROGRAMS}
    assert set(PROGRAMS) == {c.program for c in found} & set(PROGRAMS)


# --- what is run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RanksScene]:
    """The daemon, started as the documents say, without a word about ranks."""
    started = [c for page in PAGES for c in documents.commands(page) if treatment(c) is BY_FIXTURE]
    assert {tuple(c.arguments) for c in started} == {("serve",), ("serve", "--device", "cpu")}
    directory = tmp_path_factory.mktemp("docs-scene")
    with running_daemon(directory, environment={"XDIT_SIDECAR_RANKS": ""}) as daemon:
        running = RanksScene(daemon, directory)
        running.wait_until_ready()
        assert len(running.status.ranks) == 1
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documents name, in a folder."""
    folder = tmp_path_factory.mktemp("docs-files")
    PIPELINE.write(folder)
    flux_files.write_hollow(folder / "flux1-dev.safetensors", flux_files.entries_of(DEV))
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    shutil.copy(folder / "tiny-vae.safetensors", folder / "ae.safetensors")
    return folder


@pytest.fixture
def home(tmp_path: Path, files: Path, scene: RanksScene, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, in which the commands are run: the files, and a ComfyUI."""
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    comfy = tmp_path / "ComfyUI"
    for name in ("custom_nodes", "models", "comfy/text_encoders", "venv/bin"):
        (comfy / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (comfy / name).touch()
    (tmp_path / "models").symlink_to(MODELS)
    tokenizers = MODELS / TOKENIZERS
    (comfy / "comfy/sd1_tokenizer").symlink_to(tokenizers / "clip_l")
    (comfy / "comfy/text_encoders/t5_tokenizer").symlink_to(tokenizers / "t5")
    # An environment that has what the nodes require.
    python = comfy / "venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(scene.daemon.runtime_dir))
    monkeypatch.setenv("COLUMNS", "200")
    booted = tmp_path / "systemd"
    booted.mkdir()
    monkeypatch.setattr(service_module, "_BOOTED", booted)
    evict_all(scene.daemon)
    return tmp_path


def read_picture(path: Path) -> int:
    """The digit on it."""
    with Image.open(path) as image:
        size, data = image.size, image.convert("RGB").tobytes()
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(1, size[1], size[0], 3)
    (digit,) = reader().read(pixels / 255)
    return digit


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CONTRIBUTING.md"])
def test_commands_do_what_is_said(
    page: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = 0
    for command in documents.commands(page):
        how = treatment(command)
        if isinstance(how, NotRun):
            continue
        ran += 1
        arguments = [
            os.path.expanduser(word) if word.startswith("~") else word for word in command.arguments
        ]
        with monkeypatch.context() as environment:
            for name, value in command.environment.items():
                environment.setenv(name, value)
            code = run(arguments)
        out, err = capsys.readouterr()
        assert code == how.code, f"{command.text}: {out}{err}"
        if command.output is not None:
            expected = command.output.strip().splitlines()
            found = [line.rstrip() for line in (out + err).strip().splitlines()]
            assert [SECONDS.sub("N s", line) for line in found] == [
                SECONDS.sub("N s", line) for line in expected
            ], command.text
        if key_of(command) == "xdit-sidecar config --example":
            tomllib.loads(out)
        if "seven.png" in command.arguments:
            assert read_picture(home / "seven.png") == 7
    assert ran, page


def test_the_python_of_the_readme_runs(home: Path) -> None:
    (block,) = documents.blocks(documents.read("README.md"), "python")
    program = home / "program.py"
    program.write_text(block)
    loaded: list[int] = []

    class Module:
        def load_state_dict(self, tensors: dict[str, torch.Tensor], *, assign: bool) -> None:
            loaded.append(len(tensors))
            assert assign

    made = runpy.run_path(str(program), {"module": Module()})
    with made["client"]:
        made["attachment"].release()
    assert len(loaded) == 1
    assert loaded[0] > 10
