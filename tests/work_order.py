"""In which order `pytest -n` hands out the tests, and which of them stay in one process."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

# What starts ranks, ComfyUI or attackers. First, so that the end is short and no core waits.
SLOWEST = (
    "tests/ranks/service",
    "tests/service/test_under_systemd.py",
    "tests/test_demo.py",
    "tests/meaning/",
    "tests/comfyui/test_memory.py",
    "tests/comfyui/test_deaths.py",
    "tests/comfyui/",
    "tests/hostile/test_attacks.py",
    "tests/ranks/parallel",
    "tests/ranks/",
    "tests/docs/",
    "tests/health/",
    "tests/test_",
    "tests/service/",
)
# Folders whose files share a daemon or a nursery of ranks, by the name of the unit.
SHARING = {
    "tests/ranks/service/": "tests/ranks/service",
    "tests/ranks/parallel/": "tests/ranks/parallel",
    "tests/ranks/components/": "tests/ranks/parallel",
}


def unit_of(nodeid: str) -> str:
    """The file, or what it shares a daemon with: a second process would start another."""
    file = nodeid.partition("::")[0]
    return next((unit for folder, unit in SHARING.items() if file.startswith(folder)), file)


def turn_of(unit: str) -> int:
    """The lower, the sooner."""
    for turn, beginning in enumerate(SLOWEST):
        if unit.startswith(beginning):
            return turn
    return len(SLOWEST)


class SlowestFirst(LoadScopeScheduling):
    """Whole units, the slowest first; those that are alike with the most tests first."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        self.workqueue.move_to_end(min(self.workqueue, key=turn_of), last=False)
        super()._assign_work_unit(node)
