"""What processes map and what it costs, as the kernel tells: /proc/*/smaps and memory files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

REGION_NAME = "memfd:xdit-sidecar"

_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ [0-9a-f]+ \S+ (\d+) *(.*)")
_BLOCK_BYTES = 512


class HostMap(NamedTuple):
    """One piece of a process's memory that is a map of a region. Sizes in bytes.

    ``resident`` is what this process has touched; ``share`` its proportional share (PSS): a page
    that n processes map counts 1/n in each, so the sum over all processes is physical memory.
    """

    start: int
    end: int
    inode: int
    resident: int
    share: int


class HostMemory(NamedTuple):
    """Taken at one moment over a set of processes. Sizes in bytes."""

    maps: dict[int, list[HostMap]]  # pid → its maps of regions
    files: dict[int, int]  # inode of each region that a process maps or holds → memory behind it
    total: int  # PSS of everything that these processes have, heaps included

    def share(self, inode: int | None = None) -> int:
        """PSS of one region, or of all, summed over the processes."""
        return sum(
            found.share
            for maps in self.maps.values()
            for found in maps
            if inode in (None, found.inode)
        )


def measure_host(pids: Iterable[int]) -> HostMemory:
    """The region maps and the whole PSS of these processes. Raises OSError if one is gone."""
    maps, files, total = {}, {}, 0
    for pid in pids:
        maps[pid] = region_maps(pid)
        files |= _region_files(pid)
        total += _field(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Pss")
    return HostMemory(maps, files, total)


def region_maps(pid: int) -> list[HostMap]:
    """The maps of regions in one process."""
    found, current, text = [], None, ""
    for line in [*Path(f"/proc/{pid}/smaps").read_text().splitlines(), "0-0 - 0 - 0 end"]:
        if (match := _MAP.match(line)) is None:
            text += line + "\n"
            continue
        if current is not None and REGION_NAME in current[4]:
            start, end, inode = int(current[1], 16), int(current[2], 16), int(current[3])
            found.append(HostMap(start, end, inode, _field(text, "Rss"), _field(text, "Pss")))
        current, text = match, ""
    return found


def regions_anywhere() -> set[int]:
    """Inodes of the regions that any process maps, as far as this account may look."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found |= {region.inode for region in region_maps(int(entry.name))}
                found |= _region_files(int(entry.name)).keys()
            except OSError:
                continue  # ended meanwhile, or another account's
    return found


def _region_files(pid: int) -> dict[int, int]:
    files = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if REGION_NAME in os.readlink(descriptor):
                status = descriptor.stat()
                files[status.st_ino] = status.st_blocks * _BLOCK_BYTES
        except FileNotFoundError:
            continue  # closed meanwhile
    return files


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise OSError(f"this kernel's smaps has no {name}: physical copies cannot be measured")
    return int(found[1]) * 1024
