"""How long a question to the daemon takes, on either socket."""

from __future__ import annotations

import os
import time

from .. import limits
from ..errors import DeadlineExceeded
from .check import Finding, failed, passed, warning
from .units import human_ms
from .visit import Visit

PINGS = 200

_SHARE_OF_TIME = 0.25  # of what is left: the region probes come later
_SLOW_SECONDS = 0.02  # p50; a daemon at rest answers in well under a millisecond
_BUSY = "the daemon's host is overloaded, or a client floods it: `xdit-sidecar status`, `top`"


def check_control(visit: Visit) -> Finding:
    """p50 and p99 of 200 pings, or of as many as a quarter of the time allows."""
    give_up = time.perf_counter() + visit.deadline.remaining * _SHARE_OF_TIME
    times: list[float] = []
    try:
        while len(times) < PINGS and (begin := time.perf_counter()) < give_up:
            visit.client.ping(timeout=give_up - begin, should_cancel=visit.should_cancel)
            times.append(time.perf_counter() - begin)
    except DeadlineExceeded:
        if not times:
            return failed("a ping was not answered in time", _BUSY)
    if not times:
        return failed("no time was left for a single ping", "give a longer --timeout")
    times.sort()
    p50, p99 = times[len(times) // 2], times[min(len(times) - 1, len(times) * 99 // 100)]
    detail = f"p50 {human_ms(p50)}, p99 {human_ms(p99)} of {len(times)} pings"
    if len(times) < PINGS:
        return warning(f"{detail}; {PINGS} were to be made", _BUSY)
    return warning(detail, _BUSY) if p50 > _SLOW_SECONDS else passed(detail)


def check_bulk(visit: Visit) -> Finding:
    """One frame of 1 MiB there and back."""
    frame = os.urandom(limits.MIB)
    seconds = visit.deadline.remaining * _SHARE_OF_TIME
    # The first message of a connection also pays for connecting.
    visit.client.echo([b""], timeout=seconds, should_cancel=visit.should_cancel)
    begin = time.perf_counter()
    back = visit.client.echo([frame], timeout=seconds, should_cancel=visit.should_cancel)
    took = time.perf_counter() - begin
    if [bytes(part) for part in back] != [frame]:
        return failed("a frame of 1 MiB came back changed", "restart the daemon and report this")
    return passed(f"1 MiB there and back in {human_ms(took)}")
