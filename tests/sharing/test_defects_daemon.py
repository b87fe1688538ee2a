"""What once went wrong in the daemon."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import components
import pytest
import zmq
from catalog_scene import Scene
from daemon_process import DaemonProcess, running_daemon
from platforms import Platform
from xdit_sidecar.daemon import serve
from xdit_sidecar.daemon.broker import doorman as doormen
from xdit_sidecar.daemon.broker.broker import Broker
from xdit_sidecar.daemon.broker.keeper_link import KeeperGone, KeeperLink
from xdit_sidecar.daemon.broker.rank_group import RankGroup
from xdit_sidecar.daemon.commands.app import run
from xdit_sidecar.daemon.keeper import messages as k
from xdit_sidecar.daemon.settings import Settings
from xdit_sidecar.protocol import codec, limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.endpoints import Endpoints
from xdit_sidecar.protocol.errors import BadMessage, ProbeFailed

GPU = "GPU-00000000-0000-0000-0000-00000000000"


def test_a_crowd_of_probes_does_not_end_the_keeper(
    daemon: DaemonProcess, platform: Platform
) -> None:
    crowd = limits.REQUESTS_IN_FLIGHT
    start = threading.Barrier(crowd)

    def keeper() -> int | None:
        return next(d.keeper_pid for d in client.status().devices if d.device == platform.device)

    with daemon.client() as client:
        before = keeper()
        component = components.describe(components.random_tensors())
        with client.open_fill(component, platform.device) as fill:

            def probe(_: int) -> int:
                start.wait()
                return len(fill.probe("keeper", length=limits.PROBE))

            with ThreadPoolExecutor(crowd) as threads:
                assert set(threads.map(probe, range(crowd))) == {limits.PROBE}
        assert keeper() == before


def test_a_request_too_many_gives_up_on_the_keeper() -> None:
    async def scenario() -> None:
        lost: list[bool] = []
        ready = asyncio.Event()
        link = KeeperLink("cpu", on_ready=lambda _: ready.set(), on_lost=lambda: lost.append(True))
        link.start()
        try:
            await asyncio.wait_for(ready.wait(), 20)
            assert link._stream is not None
            link._stream._backlog = 0
            future = link.ask(k.DescribeDevice())
            assert not lost  # the catalog may be in the midst of something
            with pytest.raises(KeeperGone):
                await future
            await asyncio.sleep(0)
            assert lost == [True]
        finally:
            link.close()

    asyncio.run(scenario())


def test_a_long_error_fits_its_answer() -> None:
    answer = m.Answer(1, m.failed_answer(ProbeFailed("x" * 5_000)))
    decoded = codec.decode(codec.encode(answer), m.Answer, limit=limits.CONTROL_FRAME)
    assert decoded.body == m.Failed("probe-failed", "x" * limits.TEXT)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ((f"{GPU}0", f"{GPU}1", "cpu"), [f"{GPU}0", f"{GPU}1", f"{GPU}0"]),
        (("cpu",), ["cpu", "cpu", "cpu"]),
    ],
)
def test_ranks_are_spread_over_the_gpus(
    tmp_path: Path, devices: tuple[str, ...], expected: list[str]
) -> None:
    async def placed() -> list[str]:
        settings = Settings(endpoints=Endpoints(tmp_path), devices=devices, ranks=3)
        return Broker(settings).group.devices

    assert asyncio.run(placed()) == expected


def test_a_component_for_probes_is_never_committed() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "nonce:probe")
    refused = scene.error(scene.commit("s1", region))
    assert isinstance(refused, BadMessage)
    assert scene.states() == {"nonce:probe": "filling"}


def test_a_cancellation_cannot_take_over_an_open_request(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, daemon.client() as one, daemon.client() as two:
        component = components.describe(components.random_tensors())
        session = two.session(Deadline(10))
        with (
            one.open_fill(component, "cpu"),
            zmq.Context() as context,
            context.socket(zmq.DEALER) as dealer,
        ):
            dealer.linger, dealer.rcvtimeo = 0, 10_000
            dealer.connect(f"ipc://{daemon.runtime_dir}/control.sock")

            def send(body: m.RequestBody) -> None:
                dealer.send(codec.encode(m.Request(session.welcome.token, 7_000, body)))

            def answer() -> m.AnswerBody:
                found = codec.decode(dealer.recv(), m.Answer, limit=limits.CONTROL_FRAME)
                assert found.id == 7_000
                return found.body

            send(m.HandOver(device="cpu", component=component))  # waits for the filler
            send(m.CancelRequest(1))
            refused = answer()
            assert isinstance(refused, m.Failed)
            assert refused.code == BadMessage.code


def test_the_doorman_answers_whatever_happens() -> None:
    async def scenario() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        doorman = doormen.Doorman(context, lambda _: True)
        asker = context.socket(zmq.REQ)
        try:
            asker.connect(doormen.ENDPOINT)
            good = [b"1.0", b"7", b"control", b"localhost:1:2:3", b"", b"NULL"]
            for question, verdict in (
                ([b"1.0", b"7", b"control", b"\xff", b"", b"NULL"], b"500"),
                ([b"1.0"], b"500"),
                (good, b"200"),
            ):
                asker.send_multipart(question)
                async with asyncio.timeout(10):
                    while not asker.poll(0):
                        await asyncio.sleep(0.01)
                assert asker.recv_multipart()[2] == verdict
        finally:
            asker.close(0)
            doorman.close()
            context.term()

    asyncio.run(scenario())


def test_a_lock_file_that_was_just_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints, flock, calls = Endpoints(tmp_path), serve.fcntl.flock, itertools.count()
    tmp_path.chmod(0o700)

    def removed_first(descriptor: int, operation: int) -> None:
        if next(calls) == 0:
            endpoints.lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(serve.fcntl, "flock", removed_first)
    with serve.exclusive_runtime_dir(endpoints, shared=False):
        assert int(endpoints.lock.read_text()) == os.getpid()
    assert next(calls) == 2


@pytest.mark.parametrize("kind", ["keeper", "rank"])
def test_a_child_that_cannot_be_started_is_a_failed_start(kind: str) -> None:
    async def scenario() -> KeeperLink | RankGroup:
        link: KeeperLink | RankGroup
        if kind == "keeper":
            link = KeeperLink("cpu", on_ready=lambda _: None, on_lost=lambda: None)
        else:
            link = RankGroup(
                ["cpu"],
                Path("/tmp"),
                deadline=1.0,
                reserve=0,
                compiles="off",
                deliver=lambda *_: None,
                on_lost=lambda _: None,
                on_change=lambda: None,
            )
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        fillers = [os.dup(0) for _ in range(used)]  # no gap is left below the limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1, hard))
        try:
            link.start()
            async with asyncio.timeout(20):
                while link.state == "starting":
                    await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in fillers:
                os.close(descriptor)
            link.close()
        return link

    link = asyncio.run(scenario())
    assert link.state in ("failed", "degraded")
    assert "could not be started" in (link.error or "")
    assert link.starts == 3


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["serve"]])
def test_an_unusable_runtime_directory_is_wrong_usage(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runtime-dir", "/tmp/" + "x" * 200]
    assert run([*command, *options]) == 2
    assert capsys.readouterr()
