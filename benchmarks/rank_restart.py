"""What the death of a rank costs: from SIGKILL until the next forward is answered."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
from figures import Figure, percentile
from ranks_scene import RanksScene, running_ranks, some_inputs
from xdit_sidecar.protocol.errors import RankLost

RANKS = 2
ROUNDS = 3
PROMISED_SECONDS = 10.0
_ANSWER_SECONDS = 300.0


def measure() -> list[Figure]:
    """Two ranks on the CPU: the middle of three deaths, against the first start."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        began = time.perf_counter()
        with running_ranks(Path(directory, "scene"), RANKS) as scene:
            first = time.perf_counter() - began
            again = percentile([_kill_and_forward(scene) for _ in range(ROUNDS)], 50)
            ranks = [psutil.Process(pid) for pid in scene.rank_pids]
            server = ranks[0].parent()
            assert server is not None
            memory = [process.memory_full_info() for process in (server, *ranks)]
    return [
        Figure("daemon with two ranks started to ready", first, "s"),
        Figure("rank killed to next forward answered p50", again, "s", PROMISED_SECONDS),
        Figure("  the one over the other", again / first, "", 0.5),
        Figure("fork server, memory of its own", memory[0].uss / 2**20, "MiB"),
        Figure("fork server and two ranks together", sum(m.pss for m in memory) / 2**20, "MiB"),
    ]


def _kill_and_forward(scene: RanksScene) -> float:
    """Seconds that a client waits."""
    inputs = some_inputs()
    with scene.user() as user:
        user.forward(inputs)
        victim = scene.rank_pids[-1]
        began = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        while True:
            try:
                user.forward(inputs, timeout=_ANSWER_SECONDS)
            except RankLost:  # given to the old ranks, before their end was noticed
                continue
            return time.perf_counter() - began
