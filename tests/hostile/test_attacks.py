"""Whatever a local process sends, the daemon goes on, and serves the next honest client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, running_daemon

from hostile import siege
from hostile.catalogue import ATTACKS


@pytest.fixture
def besieged(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path) as daemon:
        yield daemon
        assert daemon.stop() == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_the_daemon_withstands(besieged: DaemonProcess, name: str) -> None:
    attack = ATTACKS[name]
    outcome = siege.besiege(besieged, attack, attack.few)
    assert outcome.inputs >= attack.few


def test_the_attacks_send_as_many_inputs_as_promised() -> None:
    assert sum(attack.count for attack in ATTACKS.values()) >= 100_000
