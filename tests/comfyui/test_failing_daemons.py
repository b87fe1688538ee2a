"""A daemon of another version, one that is killed, and one whose ranks are given up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui import packs, workflows
from comfyui.listener import Event
from comfyui.nodes_scene import (
    LOCAL,
    QUICK,
    REMOTE,
    SHARED,
    NodesScene,
    running_nodes,
    sampling,
)
from comfyui.server import ComfyServer, WorkflowFailed
from comfyui.workflows import STOCK, Nodes, Workflow
from xdit_sidecar.protocol import codec
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.endpoints import Endpoints
from xdit_sidecar.protocol.version import (
    PROTOCOL_VERSION,
    ProtocolVersion,
    encode_preamble,
    explain_mismatch,
)

pytestmark = pytest.mark.timeout(300)

OTHERS = [PROTOCOL_VERSION._replace(major=major) for major in (0, 9)]
GUARD = 10  # times what is promised: the machine may be busy


def base(nodes: Nodes) -> Workflow:
    return workflows.text_to_image(nodes, replace(QUICK, seed=80), save="refused", picture=False)


def samples(event: Event) -> bool:
    """Whether a step is done. (Loaders have progress bars, too.)"""
    return event.name == "progress" and event.data["node"] == "sampler"


@contextlib.contextmanager
def speaking(version: ProtocolVersion) -> Iterator[Path]:
    """The runtime directory of what greets and refuses as a daemon of another version does."""
    reason = explain_mismatch(version, PROTOCOL_VERSION)
    assert reason is not None
    refusal = codec.encode(m.Refused("version", reason))
    greeting = encode_preamble(version) + len(refusal).to_bytes(4, "big") + refusal
    with (
        tempfile.TemporaryDirectory(prefix="xs-", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        endpoints = Endpoints(Path(name))
        for path in endpoints.sockets[1:]:
            path.touch(0o600)
        listener.bind(str(endpoints.session))
        endpoints.session.chmod(0o600)
        listener.listen(16)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # shut down
                with connection:
                    connection.sendall(greeting)
                    connection.settimeout(10)
                    while connection.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield endpoints.directory
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("version", OTHERS, ids=str)
def test_another_version(tmp_path: Path, version: ProtocolVersion) -> None:
    older = "daemon" if version < PROTOCOL_VERSION else "client"
    with (
        speaking(version) as directory,
        ComfyServer(
            tmp_path / "base",
            packs={"xdit_sidecar": packs.clone()},
            environment={"XDIT_SIDECAR_RUNTIME_DIR": str(directory)},
        ) as server,
    ):
        with pytest.raises(WorkflowFailed, match=f"the {older} is too old; update the") as failure:
            server.run(base(REMOTE))
        assert str(version) in str(failure.value)
        server.run(base(STOCK))
        expected = server.tensors("refused")["samples"]
        server.run(base(LOCAL))
        assert torch.equal(server.tensors("refused")["samples"], expected)
        assert re.search(rf"samples in ComfyUI: .*the {older} is too old", server.log)


def test_daemon_killed_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_nodes(tmp_path / "scene", 1) as scene:
        coding = workflows.coding(SHARED, QUICK, save="coded")
        scene.server.run(coding)
        before = scene.server.tensors("coded-latent-image")["images"]
        workflow = workflows.text_to_image(SHARED, replace(QUICK, steps=2000), picture=False)
        with scene.server.listen() as listener:
            prompt = scene.server.queue(workflow, listener.client_id)
            listener.wait_for(samples)
            killed = time.monotonic()
            os.kill(scene.daemon.pid, signal.SIGKILL)
            failed = listener.wait_until_done(prompt).at - killed
            with pytest.raises(WorkflowFailed):
                scene.server.wait(prompt)
        with capsys.disabled():
            print(f"\ndaemon killed: the prompt failed after {failed * 1000:.0f} ms")
        assert failed < 3 * GUARD
        assert scene.daemon.process is not None
        scene.daemon.process.wait(10)
        scene.daemon.start()
        scene.daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        # The next prompt shares again, and there is one copy.
        again = workflows.coding(SHARED, replace(QUICK, prompt="again"), save="coded")
        scene.server.run(again)
        assert torch.equal(scene.server.tensors("coded-latent-image")["images"], before)
        status = scene.daemon.wait_for_status(lambda _: True)
        assert sorted(c.role for c in status.components) == ["clip_l", "t5", "vae"]
        assert all(c.state == "resident" and c.sessions for c in status.components)
        deadline = time.monotonic() + 30
        while regions_of(scene.server.pid) != 3:  # the old ones go with the next collection
            assert time.monotonic() < deadline, regions_of(scene.server.pid)
            time.sleep(0.2)
        ranks_are_given_up(scene)


def ranks_are_given_up(scene: NodesScene) -> None:
    """The loaders have nothing to complain about; samplers do as the loader says."""
    while (status := scene.daemon.wait_for_status(lambda s: True)).group.state != "degraded":
        pids = {rank.pid for rank in status.ranks if rank.pid}
        for pid in list(pids)[:1]:
            os.kill(pid, signal.SIGKILL)
        scene.daemon.wait_for_status(
            lambda s, pids=pids: not pids & {rank.pid for rank in s.ranks}, 60
        )
    settings = replace(QUICK, seed=68)
    with pytest.raises(WorkflowFailed, match="restart the daemon"):
        scene.server.run(workflows.text_to_image(REMOTE, settings, picture=False))
    expected = scene.latent(workflows.text_to_image(STOCK, settings, save="stock"), "stock")
    local = workflows.text_to_image(LOCAL, settings, save="local")
    for workflow in (local, sampling(local)):
        known = len(scene.server.log)
        assert torch.equal(scene.latent(workflow, "local"), expected)
        assert "samples in ComfyUI, because the daemon did not" in scene.server.log[known:]


def regions_of(pid: int) -> int:
    """How many regions a process has mapped."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as lines:
        return len({line.split()[4] for line in lines if "xdit-sidecar" in line})
