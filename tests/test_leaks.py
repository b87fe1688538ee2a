"""The leak check itself: it sees what is left behind and nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import leaks
import pytest

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
IMPATIENT = 0.02


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder instead of /dev/shm, where tests that run beside these have files."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(leaks, "SHM", folder)
    return folder


@pytest.fixture
def before(shm: Path) -> leaks.Snapshot:
    return leaks.Snapshot.take()


def test_nothing_new_is_no_leak(before: leaks.Snapshot) -> None:
    assert leaks.find_leaks(before) == []


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "memfd", "epoll"])
def test_an_open_descriptor_is_found(before: leaks.Snapshot, tmp_path: Path, kind: str) -> None:
    match kind:
        case "file":
            descriptors = [os.open(tmp_path / "left", os.O_CREAT | os.O_RDWR)]
        case "pipe":
            descriptors = list(os.pipe())
        case "socket":
            descriptors = [socket.socket().detach()]
        case "memfd":
            descriptors = [os.memfd_create("left")]
        case _:
            import select

            poll = select.epoll()
            descriptors = [os.dup(poll.fileno())]
            poll.close()
    try:
        found = leaks.find_leaks(before, patience=IMPATIENT)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert len(found) == len(descriptors)
    for descriptor in descriptors:
        assert any(line.startswith(f"descriptor {descriptor}: ") for line in found)


def test_a_second_descriptor_of_an_open_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "twice"
    with path.open("w"):
        before = leaks.Snapshot.take()
        with path.open("a") as again:
            found = leaks.find_leaks(before, patience=IMPATIENT)
            assert found == [f"descriptor {again.fileno()}: {path}"]


def test_a_number_used_again_for_the_same_file_is_no_leak(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    first = os.open(path, os.O_RDONLY)
    before = leaks.Snapshot.take()
    os.close(first)
    second = os.open(path, os.O_RDONLY)
    try:
        assert leaks.find_leaks(before, patience=IMPATIENT) == []
    finally:
        os.close(second)


def test_a_process_is_found(before: leaks.Snapshot) -> None:
    with subprocess.Popen(SLEEP) as process:
        found = leaks.find_leaks(before, patience=IMPATIENT)
        process.kill()
    assert len(found) == 1
    assert found[0].startswith(f"process {process.pid}: ")
    assert "time.sleep" in found[0]
    assert leaks.find_leaks(before) == []


def test_a_process_nobody_waited_for_is_found(before: leaks.Snapshot) -> None:
    with subprocess.Popen(SLEEP) as process:
        process.kill()
        # Wait for its end without taking its status.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        found = leaks.find_leaks(before, patience=IMPATIENT)
    assert len(found) == 1
    assert f"process {process.pid}: " in found[0]
    assert "nobody waited" in found[0]


def test_an_orphan_is_found(before: leaks.Snapshot) -> None:
    code = f"import subprocess; print(subprocess.Popen({SLEEP}, stdout=-3, stderr=-3).pid)"
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    orphan = int(parent.stdout)
    try:
        found = leaks.find_leaks(before, patience=IMPATIENT)
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert [line.split(":")[0] for line in found] == [f"process {orphan}"]


@pytest.mark.parametrize("daemon", [True, False])
def test_a_thread_is_found(before: leaks.Snapshot, daemon: bool) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-behind", daemon=daemon)
    thread.start()
    found = leaks.find_leaks(before, patience=IMPATIENT)
    stop.set()
    thread.join()
    assert len(found) == 1
    assert found[0].startswith("thread left-behind ")
    assert ("daemon" in found[0]) == daemon


def test_a_file_in_shared_memory_is_found(before: leaks.Snapshot, shm: Path) -> None:
    path = shm / "left"
    path.touch()
    assert leaks.find_leaks(before, patience=IMPATIENT) == [f"shared memory {path}"]


def test_shared_memory_of_another_process_is_no_leak(shm: Path) -> None:
    path = shm / "theirs"
    path.touch()
    assert leaks.used_by_others({str(path)}, {os.getpid()}) == set()
    code = "import sys, time; f = open(sys.argv[1]); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        family = {os.getpid()}
        assert leaks.used_by_others({str(path)}, family) == {str(path)}
        family.add(other.pid)
        assert leaks.used_by_others({str(path)}, family) == set()
        other.kill()


def test_what_ends_in_time_is_no_leak(before: leaks.Snapshot) -> None:
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()
    assert leaks.find_leaks(before) == []


LEAKY = """
import os, pytest

def test_clean():
    pass

def test_leaky():
    os.memfd_create("forgotten")

@pytest.mark.allow_leaks("on purpose")
def test_excused():
    os.memfd_create("excused")
"""


def run_leaky(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    here = Path(__file__).parent
    pytester.makepyfile(test_leaky=source)
    pytester.makeconftest((here / "conftest.py").read_text())
    pytester.makepyprojecttoml(
        "[tool.pytest.ini_options]\n"
        f"pythonpath = [{json.dumps(str(here))}]\n"
        'markers = ["allow_leaks(reason)", "gpu"]\n'
    )
    return pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")


def test_a_leak_fails_the_test(pytester: pytest.Pytester) -> None:
    result = run_leaky(pytester, LEAKY)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*left behind:*", "*descriptor *: /memfd:forgotten*"])
    result.stdout.no_fnmatch_line("*excused*")


def test_allowing_leaks_needs_a_reason(pytester: pytest.Pytester) -> None:
    result = run_leaky(pytester, LEAKY.replace('"on purpose"', ""))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*allow_leaks needs a reason*"])
