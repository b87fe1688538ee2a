"""Rank processes for tests: real ones, forked from a program that has imported what is slow.

Importing torch, diffusers and xfuser costs seconds of CPU per process. A `Nursery` is a
subprocess that does it once and then forks ranks on demand; what a rank found out comes back as
JSON, in a file. A rank that outlives its time limit is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("nursery.py")
ROOT = Path(__file__).resolve().parents[3]
START_LIMIT = 120.0  # seconds to import everything on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    status: str  # "ok", "raised", "died" or "hung"
    value: Any = None  # what the task returned, or the error as text

    def get(self) -> Any:
        """What the task returned; AssertionError if it did not."""
        assert self.status == "ok", f"the rank {self.status}: {self.value}"
        return self.value


class Nursery:
    """Forks ranks that run a task of `rank_tasks` or `repair_tasks`."""

    def __init__(self, directory: Path, *, loaded: bool) -> None:
        """``loaded``: ranks have xfuser, repaired; otherwise the task loads it."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._runs = 0
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **quiet}
        # With an installed package this changes nothing; with a bare tree it makes it importable.
        links = directory / "import"
        links.mkdir()
        (links / "xdit_sidecar").symlink_to(ROOT)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(links), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "loaded" if loaded else "bare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        task: str,
        world_size: int,
        *,
        limit: float = 60.0,
        settings: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> list[Outcome]:
        """Run a task on ``world_size`` ranks, which meet in a file of their own."""
        self._runs += 1
        directory = self._directory / f"run{self._runs}"
        directory.mkdir(mode=0o700)
        order = {
            "task": task,
            "world_size": world_size,
            "directory": str(directory),
            "limit": limit,
            "settings": settings or {},
            "arguments": arguments,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the nursery ended"
        outcomes = []
        for rank, status in enumerate(json.loads(line)):
            result = directory / f"rank{rank}.json"
            value = json.loads(result.read_text()) if result.exists() else None
            if isinstance(value, dict) and "raised" in value and status == "ok":
                outcomes.append(Outcome("raised", value["raised"]))
            else:
                outcomes.append(Outcome(status, value and value.get("value")))
        return outcomes

    def close(self) -> None:
        """End the program; its ranks have ended already."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(START_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the task returned on each rank; AssertionError if one did not."""
    return [outcome.get() for outcome in outcomes]
