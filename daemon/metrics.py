"""Prometheus metrics over HTTP, on a unix socket or a loopback port; off unless configured.

Answered on the broker's event loop: a scrape is one status report and some lines of text. What is
read of a request, how many there may be at once and how long each may take are bounded.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ..protocol import messages as m
from .broker.broker import Broker
from .broker.tally import Tally
from .metrics_address import MetricsAddress

_REQUEST_BYTES = 8192
_REQUEST_SECONDS = 5.0
_CONNECTIONS = 8
_PREFIX = "xdit_sidecar_"
_STATES = ("starting", "ready", "failed")


class StatusCollector(Collector):
    """The families of one report. Labels are few: devices, roles, states, kinds of requests."""

    def __init__(self, status: m.Status, tally: Tally) -> None:
        self._status = status
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """Called by the exposition."""
        yield from self._daemon()
        yield from self._devices()
        yield from self._components()
        yield from self._ranks()
        yield from self._requests()

    def _daemon(self) -> Iterator[Metric]:
        status = self._status
        info = GaugeMetricFamily(_PREFIX + "info", "1.", labels=["version", "protocol"])
        info.add_metric([status.daemon, status.protocol], 1)
        yield info
        yield _gauge("uptime_seconds", "Since the daemon started.", status.uptime_seconds)
        yield _gauge("sessions", "Open sessions.", len(status.sessions))

    def _devices(self) -> Iterator[Metric]:
        devices = self._status.devices
        for name, text, field in (
            ("device_total_bytes", "Memory of the device.", "total"),
            ("device_free_bytes", "Memory that no process uses.", "free"),
            ("device_budget_bytes", "Most that components may take.", "budget"),
            ("device_regions_bytes", "In regions of components.", "regions"),
            ("device_orphaned_bytes", "In regions whose keeper died.", "orphaned"),
            ("device_context_bytes", "Cost of the keeper's CUDA context.", "context"),
        ):
            family = GaugeMetricFamily(_PREFIX + name, text, labels=["device"])
            for device in devices:
                family.add_metric([device.device], getattr(device, field))
            yield family
        states = GaugeMetricFamily(
            _PREFIX + "device_state", "1 for the state that it is in.", labels=["device", "state"]
        )
        starts = CounterMetricFamily(
            _PREFIX + "keeper_starts", "Starts of a device's keeper.", labels=["device"]
        )
        for device in devices:
            for state in _STATES:
                states.add_metric([device.device, state], device.state == state)
            starts.add_metric([device.device], device.keeper_starts)
        yield states
        yield starts

    def _components(self) -> Iterator[Metric]:
        labels = ["device", "role", "state"]
        count = GaugeMetricFamily(_PREFIX + "components", "Copies of components.", labels=labels)
        size = GaugeMetricFamily(_PREFIX + "component_bytes", "Their size.", labels=labels)
        leases = GaugeMetricFamily(
            _PREFIX + "leases", "Sessions that hold a component.", labels=["device", "role"]
        )
        counts, sizes, held = (
            Counter[tuple[str, ...]](),
            Counter[tuple[str, ...]](),
            Counter[tuple[str, ...]](),
        )
        for c in self._status.components:
            counts[c.device, c.role, c.state] += 1
            sizes[c.device, c.role, c.state] += c.nbytes
            held[c.device, c.role] += len(c.sessions)
        for family, numbers in ((count, counts), (size, sizes), (leases, held)):
            for key, number in numbers.items():
                family.add_metric(key, number)
            yield family

    def _ranks(self) -> Iterator[Metric]:
        group, ranks = self._status.group, self._status.ranks
        if group is None:
            return
        states = GaugeMetricFamily(
            _PREFIX + "rank_state", "1 for the state that it is in.", labels=["rank", "state"]
        )
        for rank in ranks:
            for state in _STATES:
                states.add_metric([str(rank.rank), state], rank.state == state)
        yield states
        starts = CounterMetricFamily(_PREFIX + "rank_group_starts", "Starts of the ranks.")
        starts.add_metric([], max((rank.starts for rank in ranks), default=0))
        yield starts
        yield _gauge(
            "rank_group_degraded", "1 when the ranks are given up.", group.state == "degraded"
        )
        yield _gauge("jobs", "Jobs that wait or run.", group.jobs)
        yield _gauge("kept_tensors_bytes", "Named tensors, on each rank.", group.kept_bytes)

    def _requests(self) -> Iterator[Metric]:
        family = SummaryMetricFamily(
            _PREFIX + "request_seconds",
            "Requests by kind and outcome, from arrival to answer.",
            labels=["kind", "outcome"],
        )
        for (kind, outcome), ended in sorted(self._tally.ended.items()):
            family.add_metric([kind, outcome], ended.count, ended.seconds)
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def render(broker: Broker) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(broker.status(), broker.tally))
    return generate_latest(registry)


class MetricsServer:
    """Answers ``GET /metrics`` on the running event loop, from :meth:`serve` to :meth:`close`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._busy: set[asyncio.Task[None]] = set()

    async def open(self, address: MetricsAddress) -> None:
        """Take the address; nobody is answered yet. Raises OSError."""
        if address.path is None:
            self._server = await asyncio.start_server(
                self._connected,
                address.host,
                address.port,
                limit=_REQUEST_BYTES,
                start_serving=False,
            )
            return
        listener = _listen(address.path)
        self._path = address.path
        self._server = await asyncio.start_unix_server(
            self._connected, sock=listener, limit=_REQUEST_BYTES, start_serving=False
        )

    async def serve(self) -> None:
        """Answer from now on; the broker has started."""
        if self._server is not None:
            await self._server.start_serving()

    def close(self) -> None:
        """Stop listening and drop whoever is being answered."""
        if self._server is not None:
            self._server.close()
        for task in self._busy:
            task.cancel()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  asyncio makes one for each connection
        if len(self._busy) >= _CONNECTIONS:
            writer.transport.abort()
            return
        self._busy.add(task)
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except asyncio.CancelledError:  # the daemon ends
            writer.transport.abort()
        finally:
            self._busy.discard(task)

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
        if method not in (b"GET", b"HEAD"):
            return _response(b"405 Method Not Allowed", b"only GET\n")
        if path != b"/metrics":
            return _response(b"404 Not Found", b"see /metrics\n")
        answer = _response(b"200 OK", render(self._broker), CONTENT_TYPE_PLAIN_0_0_4.encode())
        return answer if method == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(status: bytes, body: bytes, kind: bytes = b"text/plain; charset=utf-8") -> bytes:
    length = str(len(body)).encode()
    return (
        b"HTTP/1.1 "
        + status
        + b"\r\nContent-Type: "
        + kind
        + b"\r\nContent-Length: "
        + length
        + b"\r\nConnection: close\r\n\r\n"
        + body
    )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a process that is gone. Raises OSError for anything else."""
    if not path.is_socket():
        raise FileExistsError(f"{path} is there and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.setblocking(False)
        try:
            knock.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # many wait there
            pass
    raise FileExistsError(f"somebody serves {path}")


def _listen(path: Path) -> socket.socket:
    """A listening socket for this account alone. Raises OSError, also if one is served there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _remove_stale(path)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_CONNECTIONS)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
