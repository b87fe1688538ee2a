"""Client processes for tests, told what to do over a pipe, killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

from fork_server import is_of_coverage, start_python

_PROGRAM = Path(__file__).with_name("client_program.py")


def uncovered_environment() -> dict[str, str]:
    """This environment for a process that becomes another account, which cannot write coverage."""
    return {name: value for name, value in os.environ.items() if not is_of_coverage(name)}


def client_environment() -> dict[str, str]:
    """This environment for a client."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class ClientProcess:
    """A process with one client; ``call`` runs one of the program's commands in it."""

    def __init__(self, runtime_dir: Path, name: str = "client") -> None:
        command = [str(_PROGRAM), str(runtime_dir), name]
        stdin, given = os.pipe()
        told, stdout = os.pipe()
        self._stdin, self._stdout = open(given, "w"), open(told)  # noqa: SIM115  closed at the end
        try:
            self._process = start_python(
                "client", command, client_environment(), (stdin, stdout, 2)
            )
        finally:
            os.close(stdin)
            os.close(stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: str, **arguments: object) -> None:
        """Start a command without waiting for it."""
        self._stdin.write(json.dumps([command, arguments]) + "\n")
        self._stdin.flush()

    def receive(self) -> object:
        """What the oldest command that was sent returned; AssertionError with what it raised."""
        line = self._stdout.readline()
        assert line, "the client process ended"
        ok, value = json.loads(line)
        assert ok, value
        return value

    def call(self, command: str, **arguments: object) -> object:
        """Run a command and wait for it."""
        self.send(command, **arguments)
        return self.receive()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(10)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL the process is reaped."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self.__exit__()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
