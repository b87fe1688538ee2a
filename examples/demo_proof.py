"""How many physical copies there are: measured in the kernel's or the driver's books."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from demo_memory import HostMemory, measure_host, regions_anywhere
from demo_processes import ClientProcess, HandedOver
from demo_report import MIB, Report, mib
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver

# Regions are multiples of 2 MiB, tensors aligned to 512 bytes: about 1 %.
_COPIES_TOLERANCE = 0.1
# What else the processes, or their CUDA contexts, allocate meanwhile: some tens of MiB.
_GROWTH_TOLERANCE = 0.35
_SETTLE_SECONDS = 5.0


class Holder(NamedTuple):
    """A client and what it was told about each component."""

    process: ClientProcess
    components: list[HandedOver]


def payload_of(holder: Holder) -> int:
    """The bytes of all tensors, without what lies between them."""
    return sum(component["payload"] for component in holder.components)


class HostProof:
    """For regions in host memory: /proc/*/smaps of every process that takes part."""

    def __init__(self, status: m.Status, clients: Sequence[ClientProcess]) -> None:
        self._daemon = {status.pid: "broker"}
        for device in status.devices:
            if device.keeper_pid is not None:
                self._daemon[device.keeper_pid] = f"keeper of {device.device[:12]}"
        self._seen: set[int] = set()
        self._before = self._measure(clients).total

    def show(self, report: Report, holders: Sequence[Holder]) -> None:
        """Print who maps what, then check the number of copies in three ways."""
        memory = self._measure([holder.process for holder in holders])
        self._seen |= memory.files.keys()
        self._show_maps(report, holders, memory)
        payload = payload_of(holders[0])
        copies = memory.share() / payload
        report.check(
            abs(copies - 1) < _COPIES_TOLERANCE,
            f"physical copies, by the sum of all shares: {copies:.2f} "
            f"({mib(memory.share())} for {mib(payload)} of weights)",
        )
        behind = sum(memory.files.values())
        report.check(
            abs(behind / payload - 1) < _COPIES_TOLERANCE,
            f"physical copies, by the memory files that any of them holds: {behind / payload:.2f} "
            f"({len(memory.files)} files with {mib(behind)} behind them)",
        )
        grown = memory.total - self._before
        report.check(
            abs(grown / payload - 1) < _GROWTH_TOLERANCE,
            f"physical copies, by what daemon and clients have grown in all, private memory "
            f"included: {grown / payload:.2f} ({mib(grown)})",
        )

    def show_ranks(self, report: Report, holder: Holder, ranks: dict[int, str]) -> None:
        """Print what the ranks (pid → name) map beside a client, and check the sum of shares."""
        self._daemon |= ranks
        memory = self._measure([holder.process])
        self._show_maps(report, [holder], memory)
        payload = payload_of(holder)
        copies = memory.share() / payload
        report.check(
            abs(copies - 1) < _COPIES_TOLERANCE,
            f"physical copies with {len(ranks)} ranks computing on them: {copies:.2f}",
        )

    def show_end(self, report: Report) -> None:
        """Check that nobody has a region of this demo any more."""
        left = regions_anywhere() & self._seen
        report.check(not left, f"regions of this demo that any process maps or holds: {len(left)}")

    def _measure(self, clients: Sequence[ClientProcess]) -> HostMemory:
        return measure_host([*self._daemon, *(client.pid for client in clients)])

    def _show_maps(self, report: Report, holders: Sequence[Holder], memory: HostMemory) -> None:
        first = holders[0]
        inodes = {}
        for component in first.components:
            (inodes[component["role"]],) = {
                found.inode
                for found in memory.maps[first.process.pid]
                if found.start <= component["address"] < found.end
            }
        names = self._daemon | {holder.process.pid: holder.process.name for holder in holders}
        rows = []
        for pid, name in names.items():
            row = [f"{name} ({pid})"]
            for inode in inodes.values():
                mine = [found for found in memory.maps[pid] if found.inode == inode]
                resident, share = sum(f.resident for f in mine), sum(f.share for f in mine)
                row += [mib(resident), mib(share)] if mine else ["nothing", ""]
            rows.append(row)
        total = ["all of them"]
        columns = ["process"]
        for role, inode in inodes.items():
            columns += [f"maps of {role}", "its share"]
            total += ["", mib(memory.share(inode))]
        report.table("Who maps which bytes, from /proc/*/smaps", columns, [*rows, total])


class DeviceProof:
    """For regions on a GPU: what its driver says is free, over all processes."""

    def __init__(self, device: str, free_before_daemon: int) -> None:
        self._driver = CudaDriver.load()
        self._ordinal = self._driver.ordinal_of(device)
        self._free_before_daemon = free_before_daemon
        self._before = self._free()
        self._regions = 0

    def show(self, report: Report, holders: Sequence[Holder]) -> None:
        """Print where each client sees the regions, then check by how much less is free."""
        rows = [
            [
                f"{holder.process.name} ({holder.process.pid})",
                component["role"],
                f"{component['address']:#x}",
                mib(component["region"]),
            ]
            for holder in holders
            for component in holder.components
        ]
        columns = ["process", "component", "mapped at", "region"]
        report.table("Who maps which bytes: regions that the keeper owns", columns, rows)
        regions = self._regions = sum(c["region"] for c in holders[0].components)
        grown = self._wait_for(lambda used: abs(used / regions - 1) < _GROWTH_TOLERANCE)
        report.check(
            abs(grown / regions - 1) < _GROWTH_TOLERANCE,
            f"physical copies, by the driver's free memory: {grown / regions:.2f} ({mib(grown)} "
            f"less is free than before the hand-over, for regions of {mib(regions)})",
        )

    def show_ranks(self, report: Report, holder: Holder, ranks: dict[int, str]) -> None:
        """Nothing: the driver does not tell a rank's maps from its own memory."""

    def show_end(self, report: Report) -> None:
        """Check that the device's memory has come back."""
        started = self._free_before_daemon - self._before
        tolerance = max(self._regions // 4, 64 * MIB)
        missing = started + self._wait_for(lambda used: used + started <= tolerance)
        report.check(
            missing <= tolerance, f"device memory that did not come back: {mib(max(0, missing))}"
        )

    def _wait_for(self, is_right: Callable[[int], bool]) -> int:
        """Bytes less than at first; the memory of a killed process comes back after a moment."""
        give_up = time.monotonic() + _SETTLE_SECONDS
        while not is_right(used := self._before - self._free()) and time.monotonic() < give_up:
            time.sleep(0.1)
        return used

    def _free(self) -> int:
        return self._driver.memory_info(self._ordinal)[0]
