"""``xdit-sidecar node``: the pack is put into a ComfyUI's folder, renewed, and taken away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import project
import pytest
from comfyui import packs
from processes import uncovered_environment
from xdit_sidecar.daemon.comfyui import pack as node_pack
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.protocol.version import PROTOCOL_VERSION

NOBODY = 65534
INSTALL, UNINSTALL, STATUS = ("node", "install"), ("node", "uninstall"), ("node", "status")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """What a ComfyUI's folder looks like."""
    return make_comfyui(tmp_path / "ComfyUI")


def make_comfyui(path: Path) -> Path:
    for name in ("custom_nodes", "models", "comfy"):
        (path / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (path / name).touch()
    return path


@pytest.fixture
def node(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: (exit status, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def pack_of(comfy: Path) -> Path:
    return comfy / "custom_nodes" / "xdit_sidecar"


def left_beside(comfy: Path) -> list[str]:
    return sorted(path.name for path in (comfy / "custom_nodes").iterdir())


def refused(node: Run, *arguments: str | Path, code: int = 1) -> str:
    """The one line that says why."""
    found, out, err = node(*arguments)
    assert (found, out) == (code, ""), (out, err)
    assert err.startswith("xdit-sidecar: ")
    assert err.count("\n") == 1
    return err


def test_install_status_uninstall(comfy: Path, node: Run) -> None:
    assert node(*STATUS, comfy)[0] == 1
    code, out, err = node(*INSTALL, comfy)
    assert (code, err) == (0, "")
    assert f"in {pack_of(comfy)}" in out
    assert f"-m pip install -r {pack_of(comfy)}/requirements.txt" in out
    files = {p.relative_to(pack_of(comfy)).as_posix() for p in pack_of(comfy).rglob("*.*")}
    assert {"__init__.py", "requirements.txt", "locales/zh/nodeDefs.json"} <= files
    assert "comfy_client_node/web/docs/XDiTStatus.md" in files
    assert not any(name.startswith(("daemon", "tests")) or "__pycache__" in name for name in files)
    code, out, _ = node(*STATUS, comfy)
    assert code == 0
    assert "a copy of xdit-sidecar" in out
    assert node(*INSTALL, comfy)[1].splitlines()[0].endswith("already")
    assert node(*UNINSTALL, comfy)[:2] == (
        0,
        f"removed {pack_of(comfy)} (xdit-sidecar {node_pack.look_at_source().version})\n",
    )
    assert left_beside(comfy) == []
    assert "nothing is installed" in refused(node, *UNINSTALL, comfy)


def test_json(comfy: Path, node: Run) -> None:
    code, out, _ = node(*INSTALL, comfy, "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["change"]["action"] == "installed"
    assert found["surroundings"]["python"] is None
    assert found["surroundings"]["pip"][1:4] == ["-m", "pip", "install"]
    state = json.loads(node(*STATUS, comfy, "--json")[1])
    assert state["ok"] is True
    assert state["pack"]["kind"] == "copy"
    assert state["pack"]["protocol"] == str(PROTOCOL_VERSION)
    assert json.loads(node(*UNINSTALL, comfy, "--json")[1])["change"]["action"] == "removed"
    code, out, _ = node(*UNINSTALL, comfy, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "pack-refused")
    code, out, _ = node(*INSTALL, comfy / "models", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "not-comfyui")


def test_folders_that_are_no_comfyui(comfy: Path, node: Run, tmp_path: Path) -> None:
    assert "does not exist" in refused(node, *INSTALL, tmp_path / "nowhere", code=2)
    assert "is a file" in refused(node, *INSTALL, comfy / "main.py", code=2)
    empty = tmp_path / "elsewhere" / "empty"
    empty.mkdir(parents=True)
    assert "no main.py and no custom_nodes" in refused(node, *INSTALL, empty, code=2)
    (empty / "custom_nodes").mkdir()
    assert "it has no main.py." in refused(node, *INSTALL, empty, code=2)
    # The portable package, and somebody who went too deep.
    assert f"name {comfy}" in refused(node, *INSTALL, tmp_path, code=2)
    assert f"name {comfy}" in refused(node, *INSTALL, comfy / "custom_nodes", code=2)
    (comfy / "custom_nodes").rmdir()
    assert "without the folder custom_nodes" in refused(node, *INSTALL, comfy, code=2)


def test_base_directory(tmp_path: Path, node: Run) -> None:
    for name in ("custom_nodes", "models", "user"):
        (tmp_path / "base" / name).mkdir(parents=True)
    assert node(*INSTALL, tmp_path / "base")[0] == 0


def test_changes_of_the_user_are_kept(comfy: Path, node: Run) -> None:
    node(*INSTALL, comfy)
    (pack_of(comfy) / "comfy_client_node" / "link.py").write_text("# mine\n")
    (pack_of(comfy) / "notes.txt").write_text("mine")
    (pack_of(comfy) / "requirements.txt").unlink()
    named = "comfy_client_node/link.py, notes.txt, requirements.txt"
    assert named in refused(node, *INSTALL, comfy)
    assert named in refused(node, *UNINSTALL, comfy)
    code, out, _ = node(*STATUS, comfy)
    assert code == 1
    assert "changed since it was installed: notes.txt" in out
    assert (pack_of(comfy) / "notes.txt").read_text() == "mine"
    assert node(*INSTALL, comfy, "--force")[0] == 0
    assert node(*STATUS, comfy)[0] == 0
    assert not (pack_of(comfy) / "notes.txt").exists()
    assert left_beside(comfy) == ["xdit_sidecar"]


def test_compiled_files_are_no_changes(comfy: Path, node: Run) -> None:
    node(*INSTALL, comfy)
    (pack_of(comfy) / "__pycache__").mkdir()
    (pack_of(comfy) / "__pycache__" / "x.pyc").touch()
    assert node(*STATUS, comfy)[0] == 0


@pytest.mark.parametrize("version", ["0.0.1", "99.0.0"])
def test_other_versions_are_replaced(comfy: Path, node: Run, version: str) -> None:
    install_version(comfy, node, version)
    code, out, _ = node(*STATUS, comfy)
    assert code == 1
    assert f"xdit-sidecar {version}" in out
    code, out, _ = node(*INSTALL, comfy)
    assert code == 0
    assert out.startswith(f"replaced {version} by xdit-sidecar ")
    assert node(*STATUS, comfy)[0] == 0
    assert left_beside(comfy) == ["xdit_sidecar"]


def install_version(comfy: Path, node: Run, version: str) -> None:
    """As an xdit-sidecar of that version would have installed it."""
    node(*INSTALL, comfy)
    root = pack_of(comfy)
    init = root / "__init__.py"
    own = str(node_pack.look_at_source().version)
    init.write_text(init.read_text().replace(own, version))
    record = root / ".xdit-sidecar.json"
    written = json.loads(record.read_text())
    written["version"] = version
    written["files"]["__init__.py"] = node_pack._digest(init)
    record.write_text(json.dumps(written))


def test_nothing_is_lost_when_the_disk_is_full(comfy: Path, node: Run, tmp_path: Path) -> None:
    """A file limit of this process stands for the disk: the kernel refuses the write."""
    install_version(comfy, node, "0.0.1")
    before = sorted(pack_of(comfy).rglob("*"))
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.dont_write_bytecode = True\n"
        "from xdit_sidecar.daemon.commands.app import run\n"
        f"sys.exit(run(['node', 'install', {str(comfy)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "nothing was changed there" in done.stderr
    assert sorted(pack_of(comfy).rglob("*")) == before
    assert left_beside(comfy) == ["xdit_sidecar"]


def test_what_a_killed_installation_left_is_swept(comfy: Path, node: Run) -> None:
    for name in ("0123abcd", "89abcdef", "mine"):
        folder = comfy / "custom_nodes" / f"xdit_sidecar.{name}.disabled"
        folder.mkdir()
        if name != "89abcdef":  # one that another installation is writing now
            os.utime(folder, (0, 0))
    node(*INSTALL, comfy)
    assert left_beside(comfy) == [
        "xdit_sidecar",
        "xdit_sidecar.89abcdef.disabled",
        "xdit_sidecar.mine.disabled",
    ]


def test_foreign_folders_are_left_alone(comfy: Path, node: Run) -> None:
    pack_of(comfy).mkdir()
    (pack_of(comfy) / "precious.txt").touch()
    for command in (INSTALL, UNINSTALL):
        assert "not xdit-sidecar's" in refused(node, *command, comfy, "--force")
    assert (pack_of(comfy) / "precious.txt").exists()
    assert node(*STATUS, comfy)[0] == 1


def test_clones_are_left_alone(comfy: Path, node: Run) -> None:
    shutil.copytree(
        project.ROOT,
        pack_of(comfy),
        ignore=shutil.ignore_patterns(*project.GENERATED, "tests", "benchmarks"),
    )
    for command in (INSTALL, UNINSTALL):
        assert "git -C" in refused(node, *command, comfy, "--force")
    code, out, _ = node(*STATUS, comfy)
    assert code == 0
    assert "a clone of xdit-sidecar" in out


def test_two_copies_are_refused(comfy: Path, node: Run) -> None:
    node(*INSTALL, comfy)
    other = comfy / "custom_nodes" / "xdit-sidecar"
    pack_of(comfy).rename(other)
    assert str(other) in refused(node, *INSTALL, comfy)
    code, out, _ = node(*STATUS, comfy)
    assert code == 1
    assert f"{other} is this node pack, too" in out


def test_link(comfy: Path, node: Run) -> None:
    assert node(*INSTALL, comfy, "--link")[0] == 0
    assert pack_of(comfy).resolve() == project.ROOT
    assert "already" in node(*INSTALL, comfy, "--link")[1]
    code, out, _ = node(*STATUS, comfy)
    assert code == 0
    assert f"a link to {project.ROOT}" in out
    assert "--force" in refused(node, *INSTALL, comfy)
    assert node(*INSTALL, comfy, "--force")[0] == 0
    assert not pack_of(comfy).is_symlink()
    assert node(*INSTALL, comfy, "--link")[0] == 0
    assert node(*UNINSTALL, comfy)[0] == 0
    assert (project.ROOT / "__init__.py").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_without_permission() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own are closed to others
        Path(directory).chmod(0o755)
        comfy = make_comfyui(Path(directory) / "ComfyUI")
        program = (
            "import os, sys\n"
            "from xdit_sidecar.daemon.commands.app import run\n"
            # Whatever is imported on use: the installation may be out of reach later.
            f"run(['node', 'status', {str(comfy)!r}]); run(['node', 'install', 'nowhere'])\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            f"sys.exit(run(['node', 'install', {str(comfy)!r}]))\n"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env=uncovered_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        assert "cannot write in" in done.stderr
        assert f"run this as {comfy.owner()}" in done.stderr
        assert "Traceback" not in done.stderr
        assert left_beside(comfy) == []


@pytest.mark.parametrize("where", ["ComfyUI/venv", "ComfyUI/.venv", "venv", "python_embeded"])
def test_the_python_of_a_comfyui(comfy: Path, node: Run, tmp_path: Path, where: str) -> None:
    place = tmp_path / where
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    _, out, _ = node(*INSTALL, comfy)
    assert f"its Python: {python}" in out
    assert "pyzmq, msgpack, msgspec must be installed there:" in out
    code, out, _ = node(*STATUS, comfy, "--json")
    assert (code, json.loads(out)["surroundings"]["missing"]) == (
        1,
        ["pyzmq", "msgpack", "msgspec"],
    )
    # It has no torch: no ComfyUI runs there, so nothing is installed into it unasked.
    code, _, err = node(*INSTALL, comfy, "--with-requirements")
    assert code == 1
    assert "name its Python with --python" in err
    # This test's own Python has all of it.
    code, out, _ = node(*STATUS, comfy, "--python", sys.executable)
    assert code == 0
    assert "it has all of requirements.txt" in out


@pytest.mark.parametrize(("version", "code"), [(None, 0), ("0.0.1", 1)])
def test_another_version_in_the_python_of_a_comfyui(
    comfy: Path, node: Run, tmp_path: Path, version: str | None, code: int
) -> None:
    """Nodes of the installed version, everything else of the pack's: that is not complete."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    own = str(node_pack.look_at_source().version)
    for name in ("torch", "pyzmq", "msgpack", "msgspec", "xdit-sidecar"):
        described = site / f"{name.replace('-', '_')}-1.dist-info" / "METADATA"
        described.parent.mkdir()
        number = (version or own) if name == "xdit-sidecar" else "99"
        described.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    node(*INSTALL, comfy)
    found, out, _ = node(*STATUS, comfy)
    assert found == code
    assert f"xdit-sidecar {version or own} is installed there, and is used instead" in out
    advice = f"{tmp_path / 'venv'}/bin/python -m pip uninstall xdit-sidecar"
    assert (advice in out) == bool(version)
    assert json.loads(node(*STATUS, comfy, "--json")[1])["ok"] == (not code)


def test_requirements_are_installed_on_request(comfy: Path, node: Run, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    log = tmp_path / "log"
    (site,) = place.glob("lib/python3*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(
        f"import sys; open({str(log)!r}, 'w').write(' '.join(sys.argv[1:])); print('pip speaks')"
    )
    requirements = pack_of(comfy) / "requirements.txt"
    code, out, _ = node(*INSTALL, comfy, "--with-requirements", "--python", python, "--json")
    assert code == 0
    assert json.loads(out)["surroundings"]["missing"] == []
    assert log.read_text() == f"install -r {requirements}"
    (site / "pip" / "__main__.py").write_text("raise SystemExit(7)")
    err = node(*INSTALL, comfy, "--with-requirements", "--python", python)[2]
    assert "exit status 7" in err
    assert f"{python} -m pip install -r {requirements}" in err


def test_a_wrong_python_is_refused_before_anything_is_done(comfy: Path, node: Run) -> None:
    assert "--python" in refused(node, *INSTALL, comfy, "--python", comfy / "main.py")
    assert left_beside(comfy) == []


def test_from_an_installed_package(tmp_path: Path, comfy: Path) -> None:
    """A wheel in another environment has everything that the pack needs, and nothing else."""
    folder = packs.installed(tmp_path / "wheel")
    assert not (folder / "tests").exists()
    environment = {**os.environ, "PYTHONPATH": str(folder.parent)}
    command = [sys.executable, "-m", "xdit_sidecar.daemon", "node"]

    def ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )

    refusal = ask("install", comfy, "--link")
    assert refusal.returncode == 1
    assert f"is installed in {folder}" in refusal.stderr
    done = ask("install", comfy)
    assert done.returncode == 0, done.stderr
    expected = {
        path
        for path in (*project.package_files(), *project.data_files())
        if path.parts[0] not in ("daemon", "systemd", "py.typed")
    }
    found = {
        p.relative_to(pack_of(comfy))
        for p in pack_of(comfy).rglob("*")
        if p.is_file() and p.name != ".xdit-sidecar.json"
    }
    assert found == expected
    assert ask("status", comfy).returncode == 0


def test_requirements_are_those_of_the_project() -> None:
    lines = (project.ROOT / "requirements.txt").read_text().splitlines()
    assert lines == project.pyproject()["project"]["dependencies"]
    assert not any("torch" in line for line in lines)
