"""The commands as users run them: processes of their own, and what they printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fork_server import Process, start_python

CHECK_FIELDS = {"name", "status", "ok", "detail", "fix", "ms"}
COMMAND_SECONDS = 60.0
_MODULE = ("-m", "xdit_sidecar.daemon")


class Answer(NamedTuple):
    """How a command ended."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def report(self) -> dict[str, Any]:
        """Its JSON, after a look at its form."""
        found = json.loads(self.output)
        assert found.keys() == {"ok", "checks"}
        for check in found["checks"]:
            assert check.keys() == CHECK_FIELDS
            assert check["status"] in {"ok", "warn", "fail", "skip"}
            assert check["ok"] is (check["status"] != "fail")
            assert check["ms"] >= 0
            assert check["detail"]
            # A failure always says what to do next.
            assert check["fix"] or check["status"] in {"ok", "skip"}
        names = [check["name"] for check in found["checks"]]
        assert len(names) == len(set(names))
        return found

    def check(self, name: str) -> dict[str, Any]:
        """One check of its report."""
        (found,) = (check for check in self.report["checks"] if check["name"] == name)
        return found

    def named(self, status: str) -> list[str]:
        """The names of all checks with this status."""
        return [check["name"] for check in self.report["checks"] if check["status"] == status]


def command(*arguments: str) -> list[str]:
    return [sys.executable, *_MODULE, *arguments]


def run_command(
    *arguments: str,
    environment: dict[str, str] | None = None,
    wrapper: Sequence[str] = (),
) -> Answer:
    """``xdit-sidecar arguments…``; no output may contain a handle, a token or a region id.

    ``wrapper`` is put in front of the command line.
    """
    begin = time.monotonic()
    given = {**os.environ, **(environment or {})}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        if wrapper:
            line = [*wrapper, *command(*arguments)]
            process: Process = subprocess.Popen(line, env=given, stdout=output, stderr=errors)
        else:
            streams = (0, output.fileno(), errors.fileno())
            process = start_python("command", [*_MODULE, *arguments], given, streams)
        try:
            code = process.wait(COMMAND_SECONDS)
        finally:
            process.kill()
            process.wait()
        seconds = time.monotonic() - begin
        for file in (output, errors):
            file.seek(0)
        answer = Answer(code, output.read(), errors.read(), seconds)
    assert "Traceback" not in answer.errors, answer.errors
    assert_no_secrets(answer.output + answer.errors)
    return answer


def health_check(
    runtime_dir: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    wrapper: Sequence[str] = (),
) -> Answer:
    """``ipc health-check --json`` against a runtime directory."""
    arguments = ("ipc", "health-check", "--json", "--runtime-dir", str(runtime_dir), *options)
    answer = run_command(*arguments, environment=environment, wrapper=wrapper)
    if answer.code != 2:
        assert (answer.code == 0) is answer.report["ok"], answer.output
    return answer


def assert_no_secrets(text: str) -> None:
    """Handles, tokens and ids are at least 16 random bytes; fingerprints are named as such."""
    for found in re.finditer(r"(?<![0-9a-f])[0-9a-f]{32,}", text):
        before = text[: found.start()].rsplit(" ", 1)[-1]
        assert re.search(r"(file|bytes|nonce):$", before), f"a secret in the output: {text}"
    assert "\\x" not in text
