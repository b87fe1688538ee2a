"""The units under a real systemd, as process 1 of namespaces of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import project
import pytest
from xdit_sidecar.daemon.unit_files import UNIT, system_files, user_files

HERE = Path(__file__).parent
SYSTEMD = Path("/lib/systemd/systemd")
SECONDS = 300.0
NAMESPACES = ("unshare", "--pid", "--fork", "--mount", "--cgroup")
ACCOUNT = 1200  # of the test of the user unit; exists only inside
DROP_IN = f"WatchdogSec=4\nEnvironment=OMP_NUM_THREADS=1 PYTHONPATH={HERE / 'blockable'}\n"


def cgroup2() -> Path | None:
    """Where the unified hierarchy is mounted, if it can be written to."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(where, os.W_OK):
            return Path(where)
    return None


def why_not() -> str:
    """What is missing for a systemd of one's own, or an empty string."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and mounts"
    for program in ("unshare", "systemctl", "systemd-sysusers"):
        if shutil.which(program) is None:
            return f"needs {program}: install the packages util-linux and systemd"
    if not SYSTEMD.exists():
        return "needs systemd: install the package"
    if cgroup2() is None:
        return "needs a cgroup2 hierarchy that can be written to"
    answer = subprocess.run(
        [*NAMESPACES, "mount", "-t", "tmpfs", "x", "/mnt"],
        capture_output=True,
        check=False,
    )
    return "" if answer.returncode == 0 else "namespaces and mounts are not allowed here"


@pytest.fixture(scope="module")
def _possible() -> None:
    if reason := why_not():
        pytest.skip(f"no systemd of one's own: {reason}")


@pytest.fixture
def scene(_possible: None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="xs-systemd-", dir="/var/tmp"))
    path.chmod(0o755)
    (path / "units/multi-user.target.wants").mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def add_unit(scene: Path, name: str, text: str, *, wanted: bool = False) -> None:
    path = scene / "units" / name
    path.parent.mkdir(exist_ok=True)
    log = f"append:{scene / 'log'}"
    path.write_text(f"{text}\n[Service]\nStandardOutput={log}\nStandardError={log}\n")
    if wanted:
        (scene / "units/multi-user.target.wants" / name).symlink_to(f"../{name}")


def boot(scene: Path, results: Path) -> dict[str, Any]:
    """Run systemd until the driver has written its results."""
    root = cgroup2()
    assert root is not None
    # The namespace takes where its first process is for the root of the hierarchy.
    group = root / f"xs-test-{os.getpid()}"
    group.mkdir()
    reach = {sys.base_prefix, str(project.ROOT)}
    inside = [place for place in sorted(reach) if Path(place).is_relative_to("/root")]
    with (scene / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("/bin/sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', str(group)),
                *(*NAMESPACES, "--kill-child", "--uts", "--ipc"),
                *("/bin/sh", str(HERE / "boot_systemd.sh"), str(scene), *inside),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"]},
        )
    deadline = time.monotonic() + SECONDS
    try:
        while not results.exists():
            assert process.poll() is None, (scene / "log").read_text()
            assert time.monotonic() < deadline, (scene / "log").read_text()
            time.sleep(0.2)
        found: dict[str, Any] = json.loads(results.read_text())
        return found
    finally:
        print((scene / "log").read_text())
        process.send_signal(signal.SIGKILL)
        process.wait()
        remove_group(group)


def remove_group(group: Path) -> None:
    """Remove a cgroup and those below it, once their processes are gone."""
    deadline = time.monotonic() + 10
    while group.exists():
        for path in [*sorted(group.rglob("*/"), reverse=True), group]:
            try:
                path.rmdir()
            except OSError:
                assert time.monotonic() < deadline, f"{path} is in use"
        time.sleep(0.05)


def check(seen: dict[str, Any]) -> None:
    assert "error" not in seen
    assert seen["start"] == 0
    assert seen["ranks"], seen["status text"]
    assert seen["client"] == [0, ""]
    assert seen["client pid"]
    assert seen["reload"] == [0, True, True]
    assert seen["restarted"]
    assert seen["watchdog"]
    assert seen["watchdog seconds"] < 8
    assert seen["restarted again"]
    assert seen["restarts"] == "2"
    assert seen["stop"] == ["inactive", "success", "0"]
    assert seen["stop seconds"] < 10
    assert seen["left"] == []
    # Not again and again, and the reason is there for `systemctl status`.
    assert seen["wrong"] == ["failed", "2", "0"]
    assert seen["wrong text"].startswith("failed: ranks in ")
    assert "= -1" in seen["wrong text"]


@pytest.mark.timeout(SECONDS + 60)
def test_the_system_unit(scene: Path) -> None:
    for file in system_files():
        if file.path.name == UNIT:
            add_unit(scene, UNIT, file.text)
        elif "sysusers" in str(file.path):
            (scene / "sysusers.conf").write_text(file.text)
    # What this test's own installation needs: its interpreter may lie in a home.
    add_unit(
        scene,
        f"{UNIT}.d/test.conf",
        f"[Service]\nProtectHome=no\n{DROP_IN}",
    )
    results = scene / "results.json"
    driver = f"{sys.executable} {HERE / 'systemd_driver.py'} system {results}"
    add_unit(
        scene,
        "driver.service",
        f"[Service]\nType=exec\nExecStartPre=systemd-sysusers {scene / 'sysusers.conf'}\n"
        f"ExecStart={driver}\n",
        wanted=True,
    )
    check(boot(scene, results))
    # Where the loop was blocked is in the log.
    log = (scene / "log").read_text().partition("Fatal Python error: Aborted")[2]
    assert "in block_for_good" in log


@pytest.mark.timeout(SECONDS + 60)
def test_the_user_unit(scene: Path) -> None:
    home = scene / "home"
    (home / ".config/systemd/user").mkdir(parents=True)
    (home / f".config/systemd/user/{UNIT}").write_text(user_files()[0].text)
    drop_in = home / f".config/systemd/user/{UNIT}.d/test.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\n{DROP_IN}")
    for path in (home, *home.rglob("*")):
        os.chown(path, ACCOUNT, ACCOUNT)
    results = home / "results.json"
    (scene / "sysusers.conf").write_text(f'u tester {ACCOUNT} "tester" {home}\n')
    runtime = f"/run/user/{ACCOUNT}"
    common = f"User=tester\nEnvironment=XDG_RUNTIME_DIR={runtime} HOME={home}\n"
    add_unit(
        scene,
        "account.service",
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        f"ExecStart=systemd-sysusers {scene / 'sysusers.conf'}\n"
        f"ExecStart=install -d -m 700 -o {ACCOUNT} -g {ACCOUNT} {runtime}\n",
    )
    add_unit(
        scene,
        "manager.service",
        "[Unit]\nRequires=account.service\nAfter=account.service\n"
        f"[Service]\nType=notify\n{common}Delegate=yes\nKillMode=mixed\n"
        f"ExecStart={SYSTEMD} --user\n",
    )
    add_unit(
        scene,
        "driver.service",
        "[Unit]\nRequires=manager.service\nAfter=manager.service\n"
        f"[Service]\n{common}"
        f"ExecStart={sys.executable} {HERE / 'systemd_driver.py'} user {results}\n",
        wanted=True,
    )
    check(boot(scene, results))
