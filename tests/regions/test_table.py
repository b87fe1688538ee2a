"""Each region is open once; nobody waits under the table's lock, finalizers never."""

from __future__ import annotations

import threading
import time

import pytest
from xdit_sidecar.protocol.errors import RegionUnavailable
from xdit_sidecar.protocol.messages import RegionGrant
from xdit_sidecar.protocol.regions import table
from xdit_sidecar.protocol.regions.base import RegionMapping

SLOW = 0.2  # seconds that opening and closing take here
GRANT = RegionGrant(
    region="a" * 32, kind="cuda_ipc", device="GPU-" + "0" * 36, nbytes=1, handle=bytes(64)
)


class Driver:
    """Stands for a driver that takes its time."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed_by: list[str] = []
        self.refuses = False

    def open(self, grant: RegionGrant, descriptor: int | None, *, writable: bool) -> RegionMapping:
        time.sleep(SLOW)
        self.opened += 1
        if self.refuses:
            raise RegionUnavailable("refused")
        return SlowMapping(self)


class SlowMapping(RegionMapping):
    address, nbytes, on_host, ordinal = 1, 1, True, 0

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def synchronize(self) -> None: ...

    def read(self, offset: int, length: int) -> bytes:
        return b""

    def write(self, offset: int, data: bytes | memoryview) -> None: ...

    def close(self) -> None:
        time.sleep(SLOW)
        self._driver.closed_by.append(threading.current_thread().name)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(table, "_open", made.open)
    return made


def at_once(count: int, call) -> list[str]:
    """Call from several threads; the texts of what they raised."""
    refusals: list[str] = []

    def run() -> None:
        try:
            call()
        except RegionUnavailable as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refusals


def test_several_at_once_open_it_once_and_the_last_closes_it(driver: Driver) -> None:
    regions = table.RegionTable()
    assert at_once(3, lambda: regions.acquire(GRANT)) == []
    assert (driver.opened, len(regions)) == (1, 1)
    for _ in range(3):
        began = time.monotonic()
        regions.release_later(GRANT)
        assert time.monotonic() - began < SLOW / 2, "a finalizer waited"
    # Who comes while it is being closed gets a new one.
    assert regions.acquire(GRANT)
    assert (driver.opened, driver.closed_by) == (2, ["xdit-sidecar-regions"])
    regions.release(GRANT)
    assert len(regions) == 0
    assert len(driver.closed_by) == 2


def test_a_finalizer_inside_the_table_does_not_wait_for_itself(driver: Driver) -> None:
    regions = table.RegionTable()
    regions.acquire(GRANT)
    with regions._lock:
        regions.release_later(GRANT)
    assert len(regions) <= 1  # whoever uses the table next does the work
    assert regions.collect(5)
    assert len(driver.closed_by) == 1


def test_everybody_who_waits_is_refused(driver: Driver) -> None:
    driver.refuses = True
    regions = table.RegionTable()
    assert at_once(3, lambda: regions.acquire(GRANT)) == ["refused"] * 3
    assert len(regions) == 0
