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
_IMPORT_SECONDS = 300.0  # of all spares, on a loaded machine


def measure() -> list[Figure]:
    """Two ranks on the CPU; the middle of three deaths, with spares and without."""
    seconds = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        for option in ("--spare-ranks", "--no-spare-ranks"):
            with running_ranks(Path(directory, option), RANKS, option) as scene:
                spares = RANKS if option == "--spare-ranks" else 0
                took = [_kill_and_forward(scene, spares) for _ in range(ROUNDS)]
                seconds[option] = percentile(took, 50)
                if spares:
                    private, proportional = _weigh_a_spare(scene)
    return [
        Figure(
            "rank killed to next forward answered p50, spare ranks",
            seconds["--spare-ranks"],
            "s",
            PROMISED_SECONDS,
        ),
        Figure(
            "rank killed to next forward answered p50, no spare ranks",
            seconds["--no-spare-ranks"],
            "s",
        ),
        Figure(
            "  the one over the other",
            seconds["--spare-ranks"] / seconds["--no-spare-ranks"],
            "",
            0.5,
        ),
        Figure("spare rank private memory", private / 2**20, "MiB"),
        Figure("spare rank proportional memory", proportional / 2**20, "MiB"),
    ]


def _kill_and_forward(scene: RanksScene, spares: int) -> float:
    """Seconds that a client waits."""
    scene.daemon.wait_for_status(
        lambda s: s.group.state == "ready" and s.group.spares == spares, _IMPORT_SECONDS
    )
    inputs = some_inputs()
    with scene.user() as user:
        user.forward(inputs)
        victim = scene.rank_pids[-1]
        began = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        while True:
            try:
                user.forward(inputs, timeout=_IMPORT_SECONDS)
            except RankLost:  # given to the old ranks, before their end was noticed
                continue
            return time.perf_counter() - began


def _weigh_a_spare(scene: RanksScene) -> tuple[int, int]:
    """Bytes that one alone uses, and with its share of what it has in common with others."""
    scene.daemon.wait_for_status(lambda s: s.group.spares == RANKS, _IMPORT_SECONDS)
    children = psutil.Process(scene.daemon.pid).children()
    ranks = {*scene.rank_pids, scene.status.devices[0].keeper_pid}
    spare = next(child for child in children if child.pid not in ranks)
    memory = spare.memory_full_info()
    return memory.uss, memory.pss
