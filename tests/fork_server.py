"""Programs forked from a process that has imported what is slow: torch costs seconds of CPU.

Run as a program it is that process: it forks when told to, and learns how each program ended. It
has one thread and no driver; whatever a program uses, it opens after the fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST = 1 << 18  # bytes of an order: the environment is in it
START_SECONDS = 60.0
STREAMS = (0, 1, 2)
# Read after the imports; with another value of any other variable they might have done otherwise.
LATE = ("XDIT_SIDECAR_", "FAKE_CUDA_", "TEST_SHIM_", "PYTEST_CURRENT_TEST", "NOTIFY_SOCKET")
# Set by torch, scikit-learn and xfuser in whoever uses them, and read by nothing imported here.
LATE += ("TORCHINDUCTOR_CACHE_DIR", "CUDA_MODULE_LOADING", "KMP_", "XDIT_LOGGING_LEVEL")


class ForkedProcess:
    """What `subprocess.Popen` has, of a program that was forked."""

    def __init__(self, server: ForkServer, pid: int, command: Sequence[str]) -> None:
        self._server = server
        # Its pid cannot become another's before the server is asked how it ended.
        self._end = os.pidfd_open(pid)
        self.pid = pid
        self.args = command
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._end], [], [], 0)[0]:
            self.returncode = self._server.ask({"pid": self.pid})
            os.close(self._end)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, once it has ended; TimeoutExpired."""
        if self.returncode is None:
            select.select([self._end], [], [], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing once it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | ForkedProcess


class ForkServer:
    """The process that forks, with these modules imported in this environment."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._environment = _early(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(environment),
            )

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment would have imported the same.

        Never where coverage is taken: it begins to trace when Python starts.
        """
        return not is_traced(environment) and _early(environment) == self._environment

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]
    ) -> ForkedProcess:
        """As `start_python`."""
        order = {"command": command, "folder": os.getcwd(), "environment": dict(environment)}
        return ForkedProcess(self, self.ask(order, streams), command)

    def ask(self, order: Mapping[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """What the process answers to an order."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            answer = self._socket.recv(LONGEST)
        assert answer, "the fork server ended"
        return json.loads(answer)

    def close(self) -> None:
        """End it; programs that still run are nobody's."""
        self._socket.close()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_running: dict[str, ForkServer] = {}


@contextmanager
def fork_server(
    kind: str, modules: Sequence[str], environment: Mapping[str, str]
) -> Iterator[None]:
    """For the length of the block `start_python` forks programs of this kind."""
    server = _running[kind] = ForkServer(modules, environment)
    try:
        yield
    finally:
        del _running[kind]
        server.close()


def start_python(
    kind: str, command: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]
) -> Process:
    """``python command…``, with copies of these three descriptors as its standard streams.

    The command begins with a program's path, or with "-m" and a module. Forked where a server of
    this kind is there and suits.
    """
    server = _running.get(kind)
    if server is not None and server.suits(environment):
        return server.start(command, environment, streams)
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=stdin, stdout=stdout, stderr=stderr
    )


def is_traced(environment: Mapping[str, str]) -> bool:
    """Whether coverage is taken of what is started so."""
    return any(map(is_of_coverage, environment))


def is_of_coverage(variable: str) -> bool:
    """Whether coverage set it for the processes that are started."""
    return variable.startswith("COVERAGE_")


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(LATE)}


def _become(order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """In the forked process: be as if Python had been started so."""
    for descriptor, stream in zip(descriptors, STREAMS, strict=True):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    command = order["command"]
    if command[0] == "-m":
        sys.argv[:], sys.path[0] = command[1:], order["folder"]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:], sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")


def main(number: str, *modules: str) -> None:
    orders = socket.socket(fileno=int(number))
    orders.set_inheritable(False)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or each program would take it all to pieces at its end
    while True:
        content, descriptors, _, _ = socket.recv_fds(orders, LONGEST, len(STREAMS))
        if not content:
            return
        order = json.loads(content)
        if "pid" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1])
        else:
            # A lock that another thread holds would stay locked in the forked process.
            assert len(os.listdir("/proc/self/task")) == 1
            answer = os.fork()
            if not answer:
                orders.close()
                return _become(order, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
