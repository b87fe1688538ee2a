"""Control round trips against a bare zmq.asyncio echo in the same run."""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from pathlib import Path

import zmq
import zmq.asyncio
from daemon_process import running_daemon
from figures import Figure, percentile

ROUNDS = 3000
TURNS = 5  # of each side, alternating, so that neither has the quieter machine


def _echo(address: str) -> None:
    async def serve() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(address)
            while True:
                await router.send_multipart(await router.recv_multipart())

    asyncio.run(serve())


def _time_echo(socket: zmq.Socket[bytes]) -> list[float]:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        socket.send(b"x" * 64)
        socket.poll(1000)
        socket.recv()
        times.append(time.perf_counter() - began)
    return times


def measure() -> list[Figure]:
    """p50 of both sides, and their ratio."""
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        address = f"ipc://{directory}/echo"
        echo = multiprocessing.get_context("spawn").Process(target=_echo, args=(address,))
        echo.start()
        with (
            zmq.Context() as context,
            context.socket(zmq.DEALER) as socket,
            running_daemon(Path(directory)) as daemon,
            daemon.client("bench") as client,
        ):
            socket.linger = 0
            socket.connect(address)
            _time_echo(socket)
            for _ in range(TURNS):
                bare += _time_echo(socket)
                for _ in range(ROUNDS):
                    began = time.perf_counter()
                    client.ping()
                    ours.append(time.perf_counter() - began)
        echo.kill()
        echo.join()
    p50, base = percentile(ours, 50), percentile(bare, 50)
    return [
        Figure("bare zmq.asyncio echo p50", base * 1e6, "us"),
        Figure("control round trip p50", p50 * 1e6, "us"),
        Figure("control round trip p99", percentile(ours, 99) * 1e6, "us"),
        Figure("control round trip p50 / bare echo p50", p50 / base, "x", 2.0),
    ]
