"""``xdit-sidecar service``: what is written where, what is refused, and what systemd thinks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import project
import pytest
from xdit_sidecar.daemon import unit_files
from xdit_sidecar.daemon.commands import service as service_module
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.daemon.unit_files import UNIT, quote, system_files, user_files

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is missing: install the package systemd",
)
# Known to systemd 254 and newer; older ones ignore them and say so.
NEWER_KEYS = ("RestartSteps", "RestartMaxDelaySec")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, on a machine that seems to run systemd."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    booted = tmp_path / "run"
    booted.mkdir()
    monkeypatch.setattr(service_module, "_BOOTED", booted)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    assert run(["service", *arguments]) == code
    out, err = capsys.readouterr()
    assert err.startswith("xdit-sidecar: ")
    assert err.count("\n") == 1
    assert not out
    return err


def test_install_and_uninstall_for_an_account(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = home / ".config/systemd/user" / UNIT
    assert run(["service", "print"]) == 0
    printed = capsys.readouterr().out
    assert not unit.exists()
    assert run(["service", "install"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {unit}" in out
    assert "systemctl --user enable --now xdit-sidecar" in out
    assert "xdit-sidecar config --example > ~/.config/xdit-sidecar/config.toml" in out
    assert 'device = "cuda" on a machine with GPUs' in out
    assert "loginctl enable-linger" in out
    text = unit.read_text()
    assert printed == f"# --- {unit}\n{text}\n"
    assert "@" not in text.replace("@system-service", "").replace("@privileged", "")
    (start,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    program = start.removeprefix("ExecStart=").split()[0]
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip()
    assert unit.stat().st_mode & 0o777 == 0o644
    # Again: nothing is in the way of the same file.
    assert run(["service", "install"]) == 0
    assert run(["service", "uninstall"]) == 0
    assert not unit.exists()
    assert "daemon-reload" in capsys.readouterr().out
    assert run(["service", "uninstall"]) == 0
    assert "nothing is installed" in capsys.readouterr().out


def test_a_changed_unit_is_kept_without_force(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = home / ".config/systemd/user" / UNIT
    assert run(["service", "install"]) == 0
    ours = unit.read_text()
    unit.write_text(ours + "# mine\n")
    capsys.readouterr()
    assert "--force" in refused(capsys, "install")
    assert "--force" in refused(capsys, "uninstall")
    assert unit.read_text().endswith("# mine\n")
    assert run(["service", "install", "--force"]) == 0
    assert unit.read_text() == ours
    unit.write_text("mine")
    assert run(["service", "uninstall", "--force"]) == 0
    assert not unit.exists()


def test_an_enabled_service_is_not_removed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = home / ".config/systemd/user" / UNIT
    assert run(["service", "install"]) == 0
    wants = unit.parent / "default.target.wants"
    wants.mkdir()
    (wants / UNIT).symlink_to(unit)
    capsys.readouterr()
    text = refused(capsys, "uninstall", "--force")
    assert "systemctl --user disable --now xdit-sidecar" in text
    assert unit.exists()


def test_below_a_root_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unit_files, "command_words", lambda: ["/opt/x/bin/xdit-sidecar"])
    monkeypatch.setattr(service_module, "_HOMES", ())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(["service", "install", "--system", "--root", str(tmp_path)]) == 0
    assert "systemctl enable --now xdit-sidecar" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {
        "etc/systemd/system/xdit-sidecar.service",
        "etc/sysusers.d/xdit-sidecar.conf",
        "etc/tmpfiles.d/xdit-sidecar.conf",
    }
    text = (tmp_path / "etc/systemd/system" / UNIT).read_text()
    assert "ExecStart=/opt/x/bin/xdit-sidecar serve --runtime-dir %t/xdit-sidecar\n" in text
    assert run(["service", "uninstall", "--system", "--root", str(tmp_path)]) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_wrong_situations(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: 1000)
        assert "sudo" in refused(capsys, "install", "--system")
        assert "sudo" in refused(capsys, "uninstall", "--system")
    with monkeypatch.context() as other:
        other.setattr(
            service_module, "command_words", lambda: ["/home/someone/venv/bin/xdit-sidecar"]
        )
        text = refused(capsys, "install", "--system", "--root", str(home))
        assert "/opt/xdit-sidecar" in text
    with monkeypatch.context() as other:
        other.setattr(service_module, "command_words", lambda: ["/opt/x/bin/xdit-sidecar"])
        other.setattr(sys, "base_prefix", "/home/someone/.local/share/python")
        text = refused(capsys, "install", "--system", "--root", str(home))
        assert "/home/someone/.local/share/python lies in /home" in text
    with monkeypatch.context() as other:
        other.setattr(service_module, "_BOOTED", home / "nowhere")
        assert "does not run systemd" in refused(capsys, "install")
    blocked = home / ".config"
    blocked.write_text("a file in the way")
    assert "cannot write" in refused(capsys, "install")
    assert run(["service", "install", "--root", str(home)]) == 2


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="this machine runs systemd")
def test_without_systemd_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "does not run systemd" in refused(capsys, "install")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("/opt/x-1.2/bin/xdit-sidecar", "/opt/x-1.2/bin/xdit-sidecar"),
        ("/opt/my models/x", '"/opt/my models/x"'),
        ("/opt/100%/x", "/opt/100%%/x"),
        ("/opt/$HOME/x", "/opt/$$HOME/x"),
        ('/opt/a"b\\c', '"/opt/a\\"b\\\\c"'),
    ],
)
def test_words_of_a_unit(word: str, quoted: str) -> None:
    assert quote(word) == quoted


def test_a_line_break_is_no_word() -> None:
    with pytest.raises(ValueError, match="control"):
        quote("/opt/a\nExecStartPre=/bin/false")


# --- systemd's own opinion


def written_units(directory: Path) -> tuple[Path, Path]:
    """Files with the system unit and the user unit, for a command that exists."""
    found = []
    for kind, files in (("system", system_files()), ("user", user_files())):
        path = directory / kind / UNIT
        path.parent.mkdir()
        path.write_text(files[-1].text)
        found.append(path)
    return found[0], found[1]


def analyze(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


@needs_analyze
@pytest.mark.parametrize("kind", ["system", "user"])
def test_systemd_accepts_the_units(kind: str, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    unit = written_units(tmp_path)[kind == "user"]
    answer = analyze(f"--{kind}", "verify", "--man=no", str(unit), XDG_RUNTIME_DIR=str(runtime))
    said = [
        line
        for line in answer.stderr.splitlines()
        if not ("Unknown key" in line and any(key in line for key in NEWER_KEYS))
    ]
    assert (answer.returncode, said) == (0, [])
    # It can say no.
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=often"))
    answer = analyze(f"--{kind}", "verify", "--man=no", str(unit), XDG_RUNTIME_DIR=str(runtime))
    assert "'often'" in answer.stderr or ": often" in answer.stderr


@needs_analyze
def test_the_system_unit_is_hardened(tmp_path: Path) -> None:
    unit = str(written_units(tmp_path)[0])
    arguments = ("security", "--offline=true", "--no-pager")
    answer = analyze(*arguments, "--threshold=25", unit)
    assert answer.returncode == 0, answer.stdout
    assert analyze(*arguments, "--threshold=5", unit).returncode != 0


OUT = ("PrivateUsers", "PrivatePIDs", "PrivateIPC", "PrivateDevices", "MemoryDenyWriteExecute")


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("key", OUT)
def test_what_sharing_cannot_bear_is_out(key: str, kind: int, tmp_path: Path) -> None:
    lines = written_units(tmp_path)[kind].read_text().splitlines()
    assert not [line for line in lines if line.startswith(f"{key}=")]


def test_every_omission_has_its_reason(tmp_path: Path) -> None:
    text = written_units(tmp_path)[0].read_text()
    left_out = text.partition("# Left out, each for a reason:")[2]
    for key in (*OUT, "ProcSubset", "PrivateNetwork", "@resources", "RootDirectory", "DynamicUser"):
        assert key in left_out


@needs_analyze
def test_whatever_systemd_misses_has_its_reason(tmp_path: Path) -> None:
    unit = written_units(tmp_path)[0]
    answer = analyze("security", "--offline=true", "--no-pager", "--json=short", str(unit))
    text = unit.read_text()
    reasons = text.partition("# Left out, each for a reason:")[2]
    found = [line["name"] for line in json.loads(answer.stdout) if not line["set"]]
    assert len(found) > 5
    for name in found:
        keys, _, value = name.partition("=")
        # "RootDirectory=/RootImage=" are two.
        for key in [keys, *re.findall(r"/(\w+)=", name)]:
            # Set, but to less than systemd wishes: then the paragraph that has it says why.
            about = [part for part in text.split("\n\n") if f"\n{key}=" in part]
            comments = "".join(re.findall(r"^#.*\n", "\n".join(about), re.MULTILINE))
            words = re.findall(r"@[\w-]+|AF_[A-Z]+|INET6?", value)
            if words or not about:
                for word in words or [key]:
                    assert word in reasons + comments, f"{name} has no reason"
            else:
                assert ": " in comments, f"{name} has no reason"


def test_an_installed_package_brings_the_files(tmp_path: Path) -> None:
    source = project.copy_to(tmp_path / "clone")
    target = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", "--target", str(target)),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); "
        "from xdit_sidecar.daemon.commands.app import run; import xdit_sidecar; "
        f"assert xdit_sidecar.__file__.startswith({str(target)!r}); "
        "sys.exit(run(sys.argv[1:]))"
    )
    for arguments in (["service", "print"], ["service", "print", "--system"]):
        answer = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        assert answer.returncode == 0, answer.stderr
        assert "Type=notify\n" in answer.stdout
    answer = subprocess.run(
        [sys.executable, "-c", code, "config", "--example"], capture_output=True, check=False
    )
    assert answer.stdout == (project.ROOT / "systemd/config.example.toml").read_bytes()
