"""The process that ranks are forked from."""

from __future__ import annotations

import os
import select
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
from xdit_sidecar.daemon.ranks.channel import Channel
from xdit_sidecar.daemon.ranks.messages import (
    Assignment,
    Ended,
    Fork,
    Forked,
    Imported,
    ServerWord,
)
from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol.errors import BadMessage
from xdit_sidecar.protocol.frames import FrameStream

# From the death of a rank to the answer of the next forward; the benchmark holds half of it.
ANSWERED_SECONDS = 20.0
PATIENCE = 120.0


def fork_server(scene: RanksScene) -> psutil.Process:
    """The parent of all ranks, a child of the broker."""
    parents = {psutil.Process(pid).ppid() for pid in scene.rank_pids}
    (pid,) = parents
    server = psutil.Process(pid)
    assert server.ppid() == scene.daemon.pid
    return server


def check_a_forward(scene: RanksScene) -> None:
    inputs = some_inputs()
    with scene.user() as user:
        expected = scene.file("small").alone(inputs)
        assert (user.forward(inputs) - expected).abs().max() < EXACT


def ranks_are_named(scene: RanksScene) -> None:
    assert [psutil.Process(pid).name() for pid in scene.rank_pids] == ["xdit-rank-0", "xdit-rank-1"]


def a_rank_that_dies_is_forked_again(scene: RanksScene) -> None:
    check_a_forward(scene)  # what this process needs for it is there
    server, starts = fork_server(scene), scene.starts
    pids = scene.rank_pids
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    scene.wait_until_ready(starts + 1)
    check_a_forward(scene)
    assert time.monotonic() - began < ANSWERED_SECONDS
    assert fork_server(scene) == server
    assert not set(pids) & set(scene.rank_pids)
    assert "status=-9" in scene.daemon.wait_for_log("rank-lost")
    assert set(scene.rank_pids) == {child.pid for child in server.children()}  # all are reaped


def a_fork_server_that_dies_takes_the_ranks_along(scene: RanksScene) -> None:
    server, starts, pids = fork_server(scene), scene.starts, scene.rank_pids
    server.kill()
    scene.daemon.wait_for_log("fork-server-lost")
    scene.wait_until_ready(starts + 1)
    assert not any(map(is_alive, pids))
    assert fork_server(scene) != server
    check_a_forward(scene)


def one_that_hangs_is_ended_by_the_start_that_waits_for_it(scene: RanksScene) -> None:
    """It takes nothing in, so the ranks that it is told to fork never come."""
    server, starts = fork_server(scene), scene.starts
    server.suspend()
    os.kill(scene.rank_pids[0], signal.SIGKILL)
    scene.daemon.wait_for_status(lambda s: s.ranks[0].starts == starts + 1)
    time.sleep(0.2)
    assert all(rank.pid is None for rank in scene.status.ranks)
    server.kill()  # as the daemon does when the start takes too long
    scene.wait_until_ready(starts + 2)
    check_a_forward(scene)


def nothing_outlives_the_broker(scene: RanksScene) -> None:
    family = [child.pid for child in psutil.Process(scene.daemon.pid).children(recursive=True)]
    assert {fork_server(scene).pid, *scene.rank_pids} < set(family)
    os.kill(scene.daemon.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, family)), 10, "children outlive the broker")
    assert scene.daemon.process is not None
    scene.daemon.process.wait(10)


@pytest.mark.timeout(600)
def test_the_life_of_a_fork_server(tmp_path: Path) -> None:
    with running_ranks(tmp_path, 2) as scene:
        ranks_are_named(scene)
        a_rank_that_dies_is_forked_again(scene)
        a_fork_server_that_dies_takes_the_ranks_along(scene)
        scene.daemon.stop()
        scene.daemon.start()
        scene.wait_until_ready()
        one_that_hangs_is_ended_by_the_start_that_waits_for_it(scene)
        nothing_outlives_the_broker(scene)
        assert "Traceback" not in scene.daemon.log


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
        channel = Channel(os.dup(theirs.fileno()))
        ours.sendall(data)
        with pytest.raises(BadMessage):
            channel.receive_assignment()
        channel.close()


def test_an_assignment_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(os.dup(theirs.fileno()))
        data = assignment()
        ours.sendall(data[:7])
        sender = threading.Timer(0.05, ours.sendall, [data[7:]])
        sender.start()
        assert channel.receive_assignment() == GOOD
        sender.join()
        channel.close()


def words(sock: socket.socket, count: int) -> list[object]:
    """So many words of a fork server."""
    stream, heard = FrameStream(sock.dup()), []
    until = time.monotonic() + PATIENCE
    while len(heard) < count:
        assert time.monotonic() < until, heard
        select.select([stream], [], [], 1.0)
        stream.read_available()
        heard += [
            codec.decode(frame, ServerWord, limit=4096) for frame in iter(stream.take_frame, None)
        ]
    stream.close()
    return heard


def order_a_process(server: socket.socket) -> socket.socket:
    """The broker's end of the channel of the process that is forked."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(server, [framed(codec.encode(Fork()))], [theirs.fileno()])
    return ours


@pytest.mark.timeout(300)
def test_a_fork_server_alone(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "xdit_sidecar.daemon.ranks"),
                *("--channel", str(theirs.fileno()), "--parent", str(os.getpid())),
                *("--world-size", "1", "--backend", "gloo", "--deadline", "5"),
                *("--meeting-file", str(tmp_path / "meeting"), "--runtime-dir", "none"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
    with ours, order_a_process(ours) as left, order_a_process(ours) as misled:
        imported, first, second = words(ours, 3)  # it was told before it could listen
        assert isinstance(imported, Imported)
        assert isinstance(first, Forked)
        assert isinstance(second, Forked)
        assert len(os.listdir(f"/proc/{process.pid}/task")) == 1
        # The second does not hold the channel of the first: its end is seen.
        left.shutdown(socket.SHUT_WR)  # as when the broker does not want it any more
        assert words(ours, 1) == [Ended(first.pid, 0)]
        misled.sendall(NONSENSE["another key"])
        assert words(ours, 1) == [Ended(second.pid, 1)]
        assert b"BadMessage" in misled.recv(4096)
        third = order_a_process(ours)
        (forked,) = words(ours, 1)
        assert isinstance(forked, Forked)
    with third:
        errors = process.communicate(timeout=PATIENCE)[1]  # the broker has hung up
        assert not is_alive(forked.pid)
    assert errors.splitlines() == [
        "xdit-sidecar-rank: not a valid message: Object contains unknown field `command`"
    ]
    assert process.returncode == 0
    assert not (tmp_path / "meeting").exists()


# As a fork server does; then whether a process forked from it can use CUDA.
_CUDA_AFTERWARDS = """
import os, torch
from xdit_sidecar.daemon.ranks.unasked_driver import check_unasked, unasked_driver
with unasked_driver():
    from xdit_sidecar.daemon.ranks.worker import load_engine
    load_engine("cuda")
check_unasked()
child = os.fork()
if not child:
    print("sum:", torch.ones(8, device="cuda").sum().item(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.gpu
def test_cuda_is_there_after_the_fork() -> None:
    command = [sys.executable, "-c", _CUDA_AFTERWARDS]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.split("sum:")[1]) == 8
