"""Hand-over, attach and release by eight processes that are killed and stopped meanwhile."""

from __future__ import annotations

from pathlib import Path

from daemon_process import running_daemon
from platforms import Platform
from soak.cycles import BUDGET, run_cycles

CYCLES = 200


def test_nothing_leaks_when_clients_are_killed(platform: Platform, tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--budget", str(BUDGET), device=platform.option) as daemon:
        figures = run_cycles(daemon, platform.device, CYCLES)
        assert figures.cycles >= CYCLES
        assert figures.stops + figures.kills
        assert daemon.stop() == 0
    assert not daemon.runtime_dir.exists()
