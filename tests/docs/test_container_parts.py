"""What docs/docker.md says, with the parts that containers are made of: namespaces and mounts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import project
import psutil
import pytest
import yaml
from daemon_process import DaemonProcess, running_daemon
from health_command import command, health_check
from processes import uncovered_environment
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.protocol.endpoints import RUNTIME_DIR_VARIABLE
from xdit_sidecar.protocol.errors import DaemonAbsent

APART = ("unshare", "--mount", "--pid", "--ipc", "--net", "--uts", "--fork", "--kill-child")
APART = (*APART, "--mount-proc")


def need(*wrapper: str) -> None:
    """Skip where this host does not let us leave its namespaces."""
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"NOT TESTED: {' '.join(wrapper)} is not allowed here")


def mounted(directory: Path, at: Path) -> tuple[str, ...]:
    """A wrapper: in namespaces of its own, with a directory mounted elsewhere, to read only."""
    script = f'mount --bind "{directory}" "{at}" && mount -o remount,bind,ro "{at}" && '
    script += f'! touch "{at}/x" 2>/dev/null && exec "$@"'
    return (*APART, "sh", "-c", script, "sh")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture
def inside() -> Iterator[Path]:
    """A short path, as one inside a container."""
    with tempfile.TemporaryDirectory(prefix="xc-", dir="/tmp") as name:
        yield Path(name)


def test_a_client_with_the_directory_mounted(daemon: DaemonProcess, inside: Path) -> None:
    need(*APART)
    answer = health_check(inside, wrapper=mounted(daemon.runtime_dir, inside))
    assert answer.code == 0, answer.output
    assert answer.named("warn") == ["peer"]
    assert "calls itself pid" in answer.check("peer")["detail"]
    assert "host memory does not mind" in answer.check("namespaces")["detail"]
    assert "read there" in answer.check("region cpu")["detail"]


def test_a_client_without_the_mount(daemon: DaemonProcess, inside: Path) -> None:
    need(*APART)
    inside.chmod(0o755)  # as Docker makes it
    answer = health_check(inside, wrapper=APART)
    assert answer.code == 3
    assert "has mode 0755" in answer.check("runtime directory")["detail"]
    assert "no xdit-sidecar daemon answers in" in answer.check("daemon")["detail"]


def test_a_daemon_does_not_serve_in_a_directory_that_docker_made(inside: Path) -> None:
    inside.chmod(0o755)
    arguments = command("serve", "--device", "cpu", "--runtime-dir", str(inside))
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "has mode 0755, wider than 0700" in done.stderr


def test_a_client_in_a_user_namespace(daemon: DaemonProcess) -> None:
    wrapper = ("unshare", "--user", "--map-root-user", "--pid", "--fork")
    need(*wrapper)
    answer = health_check(daemon.runtime_dir, wrapper=wrapper)
    assert answer.code == 0, answer.output
    assert answer.named("warn") == ["peer"]


@contextlib.contextmanager
def contained_daemon(inside: Path, log: Path) -> Iterator[None]:
    """A daemon that is process 1 of its own PID namespace and serves ``inside``."""
    serve = command("serve", "--device", "cpu", "--ranks", "0", "--runtime-dir", str(inside))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*APART, *serve], stderr=output, env=uncovered_environment(), stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        # `unshare` itself does not heed SIGTERM: to its child, process 1 in there.
        for child in psutil.Process(process.pid).children():
            child.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.wait(5)


def test_a_daemon_in_a_container(inside: Path, tmp_path: Path) -> None:
    need(*APART)
    from xdit_sidecar.protocol.client.client import Client

    with contained_daemon(inside, tmp_path / "log"):
        until = time.monotonic() + 30
        with Client(inside, name="outside") as client:
            while True:
                with contextlib.suppress(DaemonAbsent):
                    status = client.status()
                    if all(device.state == "ready" for device in status.devices):
                        break
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.02)
            (own,) = status.sessions
            assert (status.pid, own.pid) == (1, 0)
        assert health_check(inside).code == 0
        # A container beside it.
        assert health_check(inside, wrapper=APART).code == 0
        second = command("serve", "--device", "cpu", "--runtime-dir", str(inside))
        done = subprocess.run(second, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 2
        assert "serves" in done.stderr
        assert "already" in done.stderr


def compose_service() -> dict[str, Any]:
    """ComfyUI's in the example of docs/docker.md."""
    (block,) = documents.blocks(documents.read("docs/docker.md"), "yaml")
    service: dict[str, Any] = yaml.safe_load(block)["services"]["comfyui"]
    return service


def test_the_compose_file_says_what_is_needed() -> None:
    service = compose_service()
    assert (service["pid"], service["ipc"]) == ("host", "host")
    place = service["environment"][RUNTIME_DIR_VARIABLE]
    assert f"/run/user/1000/xdit-sidecar:{place}" in service["volumes"]
    assert service["user"].startswith("1000")


def test_the_nodes_go_into_the_mounted_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the folders that docs/docker.md makes and mounts, and nothing else."""
    make, install = [
        c for c in documents.commands("docs/docker.md") if c.program in ("mkdir", "xdit-sidecar")
    ][:2]
    monkeypatch.chdir(tmp_path)
    subprocess.run(make.words, check=True)
    assert run(install.arguments) == 0, capsys.readouterr()
    mounts = dict(volume.split(":")[:2] for volume in compose_service()["volumes"])
    made = {f"./{path.relative_to(tmp_path)}" for path in tmp_path.glob("*/*")}
    assert made == {host for host in mounts if host.startswith("./")}
    (nodes,) = [host for host, inside in mounts.items() if inside == "/ComfyUI/custom_nodes"]
    assert (tmp_path / nodes / "xdit_sidecar" / "comfy_client_node").is_dir()


def test_the_image_is_built_from_nothing_that_was_generated() -> None:
    ignored = documents.read(".dockerignore").splitlines()
    assert {name.removeprefix("**/") for name in ignored} >= project.GENERATED
    kept = {path.parts[0] for path in (*project.package_files(), *project.data_files())}
    assert not kept & set(ignored)


def test_the_image_starts_the_daemon() -> None:
    text = (project.ROOT / "docs/daemon.Dockerfile").read_text()
    (entry,) = [line for line in text.splitlines() if line.startswith("ENTRYPOINT")]
    words = yaml.safe_load(entry.removeprefix("ENTRYPOINT"))
    answer = subprocess.run(
        [str(Path(sys.executable).with_name(words[0])), *words[1:], "--help"],
        capture_output=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
