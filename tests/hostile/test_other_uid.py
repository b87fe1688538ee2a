"""Another account gets nothing, unless the daemon's owner says so.

Needs root, to become ``nobody``. The attacker runs a copy of the package that everybody may read:
the checkout itself may lie in a private directory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import project
import pytest
from daemon_process import DaemonProcess, running_daemon

from hostile.victim import CONTENT, small_component

NOBODY = 65534
NEEDED = ("msgspec", "msgpack", "zmq", "pyzmq.libs")
PROGRAM = Path(__file__).with_name("nobody.py")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="NOT TESTED that another uid gets nothing: only root can become nobody",
)


@pytest.fixture(scope="module")
def open_copy() -> Iterator[Path]:
    """A directory that nobody can read, with the package and what the client side needs."""
    directory = Path(tempfile.mkdtemp(prefix="xs-nobody-", dir="/tmp"))
    try:
        package = directory / "xdit_sidecar"
        for path in [*project.package_files(), Path("__init__.py")]:
            if path.parts[0] in ("protocol", "__init__.py"):
                (package / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(project.ROOT / path, package / path)
        site = Path(sysconfig.get_path("platlib"))
        for name in NEEDED:
            if (site / name).is_dir():
                shutil.copytree(
                    site / name, directory / name, ignore=shutil.ignore_patterns("tests")
                )
        shutil.copyfile(PROGRAM, directory / "program.py")
        for folder, _, files in os.walk(directory):
            for path in (folder, *(os.path.join(folder, file) for file in files)):
                os.chmod(path, 0o755)  # noqa: S103  readable by everybody is the point
        yield directory
    finally:
        shutil.rmtree(directory)


def as_nobody(
    open_copy: Path, daemon: DaemonProcess, *commands: str, token: bytes = b"", component: str = ""
) -> dict[str, str]:
    """What nobody was answered, by command."""
    # -S: the site-packages of this environment may be out of nobody's reach, and are not needed.
    done = subprocess.run(
        [
            *(sys.executable, "-S", "-B", str(open_copy / "program.py")),
            *(str(open_copy), str(daemon.runtime_dir), token.hex(), component, *commands),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def open_up(daemon: DaemonProcess) -> None:
    """The mistake of an administrator: everybody may enter and connect."""
    for path in (daemon.runtime_dir, *daemon.runtime_dir.iterdir()):
        path.chmod(0o777)


def test_a_private_directory_keeps_others_out(open_copy: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        answers = as_nobody(open_copy, daemon, "list", "client", "raw-session", "raw-control")
        assert answers == {
            "list": "PermissionError",
            "client": "NotAllowed",
            "raw-session": "PermissionError",
            "raw-control": "PermissionError",
        }
        assert "session-refused" not in daemon.log


def test_open_permissions_do_not_let_others_in(open_copy: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, daemon.client("owner") as owner:
        component = small_component(1)
        held = owner.hand_over(component, "cpu", lambda writer: writer.write(0, CONTENT))
        assert owner._session is not None
        token = owner._session.welcome.token
        open_up(daemon)
        answers = as_nobody(
            open_copy,
            daemon,
            *("client", "raw-session", "control", "bulk", "raw-control"),
            token=token,
            component=component.fingerprint,
        )
        assert answers == {
            "client": "NotAllowed",
            "raw-session": "refused not-allowed",
            "control": "no answer",
            "bulk": "no answer",
            "raw-control": "cut off",
        }
        line = daemon.wait_for_log("session-refused")
        assert f"uid={NOBODY}" in line
        assert "pid=" in line
        # It came to nobody's ears that a token was right: no request of nobody was even read.
        assert "request-refused" not in daemon.log
        assert token.hex() not in daemon.log
        assert held.mapping.read(0, len(CONTENT)) == CONTENT
        owner.ping()
        held.release()


def test_a_trusted_uid_shares(open_copy: Path, tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, "--trust-uid", str(NOBODY)) as daemon,
        daemon.client("owner") as owner,
    ):
        component = small_component(1)
        held = owner.hand_over(component, "cpu", lambda writer: writer.write(0, CONTENT))
        answers = as_nobody(
            open_copy, daemon, "list", "client", "attach", component=component.fingerprint
        )
        assert answers == {"list": "PermissionError", "client": "pong", "attach": "same bytes"}
        (copy,) = owner.status().components
        assert copy.uid == os.geteuid()
        held.release()


def test_a_token_does_not_work_for_a_trusted_uid(open_copy: Path, tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, "--trust-uid", str(NOBODY)) as daemon,
        daemon.client("owner") as owner,
    ):
        owner.ping()
        assert owner._session is not None
        token = owner._session.welcome.token
        answers = as_nobody(open_copy, daemon, "control", "bulk", token=token)
        assert answers == {"control": "unauthorized", "bulk": "unauthorized"}
