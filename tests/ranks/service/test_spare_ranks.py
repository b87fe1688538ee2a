"""Processes that have imported everything and wait to take a rank's place."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import msgspec
import psutil
import pytest
from ranks_scene import EXACT, RanksScene, is_alive, running_ranks, some_inputs, wait_until
from xdit_sidecar.daemon.ranks.channel import RankChannel
from xdit_sidecar.daemon.ranks.messages import Assignment, Imported
from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol.errors import BadMessage

# From the death of a rank to the answer of the next forward; the benchmark holds half of it.
ANSWERED_SECONDS = 20.0
PATIENCE = 120.0


def spare_pids(scene: RanksScene) -> list[int]:
    """The processes that were started for ranks and are none; the oldest first."""
    ranks = set(scene.rank_pids)
    children = psutil.Process(scene.daemon.pid).children()
    started = [c for c in children if "xdit_sidecar.daemon.ranks" in c.cmdline()]
    started.sort(key=lambda child: child.create_time())
    return [child.pid for child in started if child.pid not in ranks]


def wait_for_spares(scene: RanksScene, count: int = 2) -> list[int]:
    """Their pids, once so many are ready."""
    scene.daemon.wait_for_status(lambda s: s.group.spares == count, PATIENCE)
    return spare_pids(scene)


def kill_a_rank(scene: RanksScene) -> None:
    """Returns when the group is ready again."""
    starts = scene.starts
    os.kill(scene.rank_pids[1], signal.SIGKILL)
    scene.wait_until_ready(starts + 1)


def check_a_forward(scene: RanksScene) -> None:
    inputs = some_inputs()
    with scene.user() as user:
        expected = scene.file("small").alone(inputs)
        assert (user.forward(inputs) - expected).abs().max() < EXACT


def ranks_take_the_spares(scene: RanksScene) -> None:
    check_a_forward(scene)  # what this process needs for it is there
    spares = wait_for_spares(scene)
    assert not set(spares) & {session.pid for session in scene.status.sessions}
    began = time.monotonic()
    kill_a_rank(scene)
    check_a_forward(scene)
    assert time.monotonic() - began < ANSWERED_SECONDS
    assert scene.rank_pids == spares


def ranks_die_before_there_are_spares(scene: RanksScene) -> None:
    assert scene.group.spares < 2
    importing = spare_pids(scene)
    kill_a_rank(scene)
    assert set(importing) <= set(scene.rank_pids)  # further than a fresh process
    check_a_forward(scene)


def a_spare_that_dies_is_replaced(scene: RanksScene) -> None:
    before, ranks, starts = wait_for_spares(scene), scene.rank_pids, scene.starts
    os.kill(before[0], signal.SIGKILL)
    scene.daemon.wait_for_log("spare-lost")
    assert scene.group.spares == 1
    after = wait_for_spares(scene)
    assert before[1] in after
    assert before[0] not in after
    assert (scene.rank_pids, scene.starts, scene.group.error) == (ranks, starts, None)


def spares_that_always_die_are_given_up(scene: RanksScene) -> None:
    ranks = scene.rank_pids
    until = time.monotonic() + PATIENCE
    while "spares-given-up" not in scene.daemon.log:
        assert time.monotonic() < until
        for pid in spare_pids(scene):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid), 10, "it lives on")
    assert (scene.group.spares, spare_pids(scene)) == (0, [])
    assert (scene.rank_pids, scene.group.state) == (ranks, "ready")
    kill_a_rank(scene)  # and there are new ones


def nothing_outlives_the_broker(scene: RanksScene) -> None:
    family = [child.pid for child in psutil.Process(scene.daemon.pid).children(recursive=True)]
    assert set(spare_pids(scene)) < set(family)
    os.kill(scene.daemon.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, family)), 10, "children outlive the broker")
    assert scene.daemon.process is not None
    scene.daemon.process.wait(10)


@pytest.mark.timeout(600)
def test_spares(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2, "--spare-ranks") as scene:
        ranks_take_the_spares(scene)
        ranks_die_before_there_are_spares(scene)
        a_spare_that_dies_is_replaced(scene)
        spares_that_always_die_are_given_up(scene)
        wait_until(lambda: spare_pids(scene), 10, "no spare is started")
        nothing_outlives_the_broker(scene)
        assert "Traceback" not in scene.daemon.log


def test_spares_can_be_switched_off(scene: RanksScene) -> None:
    assert (scene.group.spares, spare_pids(scene)) == (0, [])


# --- the process itself


GOOD = Assignment(rank=0, device="cpu", reserve=0, neighbours=1, compiles="off")


def framed(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


def assignment(**changes: object) -> bytes:
    """A good one, changed."""
    return framed(msgpack.packb({**msgspec.structs.asdict(GOOD), **changes}))


NONSENSE = {
    "bytes": framed(b"\xc1" * 10),
    "a list": framed(msgpack.packb([0, "cpu", 0, 1, "off"])),
    "rank 64": assignment(rank=64),
    "no device": assignment(device=""),
    "another key": assignment(command="x"),
    "a text for a number": assignment(reserve="0"),
    "too long": struct.pack("!I", 1 << 30),
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_what_is_no_assignment_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = RankChannel(os.dup(theirs.fileno()))
        ours.sendall(data)
        with pytest.raises(BadMessage):
            channel.wait_for_assignment()
        channel.close()


def test_an_assignment_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = RankChannel(os.dup(theirs.fileno()))
        data = assignment()
        ours.sendall(data[:7])
        sender = threading.Timer(0.05, ours.sendall, [data[7:]])
        sender.start()
        assert channel.wait_for_assignment() == GOOD
        sender.join()
        channel.close()


def start_process(directory: Path) -> tuple[subprocess.Popen[str], socket.socket]:
    """A process for a rank, and the broker's end of its channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "xdit_sidecar.daemon.ranks"),
                *("--channel", str(theirs.fileno()), "--parent", str(os.getpid())),
                *("--world-size", "1", "--backend", "gloo", "--deadline", "5"),
                *("--meeting-file", str(directory / "meeting"), "--runtime-dir", "none"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
    return process, ours


@pytest.mark.timeout(300)
def test_a_process_without_an_assignment_ends(tmp_path: Path) -> None:
    misled, told = start_process(tmp_path)
    left, hung_up = start_process(tmp_path)
    with told, hung_up:
        told.sendall(NONSENSE["another key"])
        hung_up.shutdown(socket.SHUT_WR)  # as when the broker ends
        assert misled.communicate(timeout=PATIENCE)[1].splitlines()[-1:] == [
            "xdit-sidecar-rank: not a valid message: Object contains unknown field `command`"
        ]
        assert misled.returncode == 1
        errors = left.communicate(timeout=PATIENCE)[1]
        assert (left.returncode, "Traceback" in errors) == (0, False)
        words = told.recv(4096)
        assert words.startswith(framed(codec.encode(Imported())))
        assert b"BadMessage" in words
    assert not (tmp_path / "meeting").exists()


# As a spare does; then whether this process has a context on any GPU.
_CONTEXTS = """
import ctypes
from xdit_sidecar.daemon.ranks.worker import load_engine
load_engine(gpu=True)
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
for device in range(count.value):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    assert not active.value, device
print("devices:", count.value)
"""


@pytest.mark.gpu
def test_imports_make_no_cuda_context() -> None:
    command = [sys.executable, "-c", _CONTEXTS]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split("devices:")[1]) > 0
