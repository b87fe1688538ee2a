"""What was found by attacking, each by itself, and the parts that defend."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon_process import running_daemon
from xdit_sidecar.daemon.broker.doorman import Allowance, peer_from_address
from xdit_sidecar.daemon.broker.inbox import Inbox
from xdit_sidecar.daemon.broker.log import Limiter
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.endpoints import resolve_runtime_dir
from xdit_sidecar.protocol.errors import DeadlineExceeded
from xdit_sidecar.protocol.peers import Peer

from hostile import wire
from hostile.crowds import foretell_routing_ids

ONE, TWO = Peer(pid=1, uid=0, gid=0), Peer(pid=2, uid=0, gid=0)


@dataclass
class Note:
    text: str

    @property
    def nbytes(self) -> int:
        return len(self.text)


def test_processes_are_served_in_turn() -> None:
    inbox: Inbox[Note] = Inbox(limit=3)
    assert [inbox.put(ONE, Note(f"flood{i}")) for i in range(5)] == [True] * 3 + [False] * 2
    assert inbox.put(TWO, Note("honest"))
    assert inbox.nbytes == 3 * 6 + 6
    taken = []
    while (item := inbox.take()) is not None:
        taken.append(item[1].text)
    assert taken == ["flood0", "honest", "flood1", "flood2"]
    assert inbox.nbytes == 0


def test_an_allowance_refills() -> None:
    allowance = Allowance(burst=2, per_second=10)
    assert [allowance.take(0.0, "a") for _ in range(3)] == [True, True, False]
    assert allowance.take(0.0, "b")
    assert not allowance.take(0.05, "a")
    assert allowance.take(0.15, "a")
    allowance.forget(1_000.0)
    assert allowance.take(1_000.0, "a")


@pytest.mark.parametrize("address", ["", "127.0.0.1", "localhost:1:2", "localhost:a:b:c"])
def test_only_ipc_peers_have_an_identity(address: str) -> None:
    assert peer_from_address(address) is None
    assert peer_from_address("localhost:1:2:3") == Peer(pid=3, uid=1, gid=2)


def test_a_peer_that_misbehaves_in_a_loop_gets_few_lines() -> None:
    limiter = Limiter()
    admitted = [limiter.admit(100.0, "refused", 7)[0] for _ in range(1_000)]
    assert 0 < sum(admitted) < 100
    assert limiter.admit(100.0, "refused", 8) == (True, 0)  # another process has its own
    left_out = 1_000 - sum(admitted)
    assert limiter.admit(200.0, "refused", 7) == (True, left_out)
    everybody = sum(limiter.admit(300.0, "refused", pid)[0] for pid in range(5_000))
    assert everybody <= 1_000


def test_routing_ids_cannot_be_foretold(tmp_path: Path) -> None:
    # libzmq 4.3.5 aborts the process when the next id that it gives is one that a peer has chosen.
    with running_daemon(tmp_path) as daemon, daemon.client() as client:
        client.ping()
        for path in (client.endpoints.control, client.endpoints.bulk):
            with contextlib.ExitStack() as held:
                for foretold in foretell_routing_ids(sockets=6, peers=16):
                    held.enter_context(wire.raw_zmq(path, foretold))
                for _ in range(4):
                    with daemon.client() as other:
                        other.ping()
                        other.echo([b"x"])
        assert daemon.process is not None
        assert daemon.process.poll() is None


def test_ids_start_somewhere_else_each_time() -> None:
    # The daemon's own code in fresh processes: what ZeroMQ would have given without it is known.
    code = (
        "import zmq; from xdit_sidecar.daemon.broker.doorman import hide_routing_ids\n"
        "hide_routing_ids(); c = zmq.Context(); r = c.socket(zmq.ROUTER); r.bind('inproc://x')\n"
        "d = c.socket(zmq.DEALER); d.connect('inproc://x'); d.send(b'')\n"
        "print(r.recv_multipart()[0].hex()); d.close(0); r.close(0); c.term()"
    )
    given = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(given) == 3
    assert "006b8b4567\n" not in given


def test_the_daemon_stops_during_a_flood_of_connections(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        endpoints = resolve_runtime_dir(daemon.runtime_dir)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                try:
                    with wire.connect(endpoints.control) as sock:
                        sock.sendall(wire.GREETING)
                except OSError:
                    return

        threads = [threading.Thread(target=flood) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        try:
            assert daemon.stop() == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_silent_streams_do_not_keep_others_out(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        code = (
            "import socket, sys, time\n"
            "held = []\n"
            f"for _ in range({2 * limits.UNGREETED_SESSIONS}):\n"
            "    held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(sys.argv[1])\n"
            "print(flush=True); time.sleep(30)"
        )
        path = str(daemon.runtime_dir / "session.sock")
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as crowd:
            assert crowd.stdout is not None
            crowd.stdout.readline()
            began = time.monotonic()
            with daemon.client() as client:
                client.ping()
            assert time.monotonic() - began < limits.HELLO_SECONDS / 2
            crowd.kill()


def test_connecting_to_a_stopped_daemon_has_a_deadline(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        held = []
        try:
            # Fill the queue of connections that wait to be accepted.
            while (sock := _connect_at_once(daemon.runtime_dir / "session.sock")) is not None:
                held.append(sock)
                assert len(held) < 10_000
            with Client(daemon.runtime_dir) as client:
                began = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    client.session(Deadline(0.5))
                assert time.monotonic() - began < 2.0
        finally:
            for sock in held:
                sock.close()
            daemon.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        with daemon.client() as client:
            client.ping()


def _connect_at_once(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(str(path))
    except BlockingIOError:
        sock.close()
        return None
    return sock
