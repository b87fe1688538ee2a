"""Two ComfyUIs at once on one daemon: the same numbers as alone, one copy, fair turns."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from comfyui import workflows
from comfyui.listener import Event
from comfyui.nodes_scene import CODED, QUICK, SHARED, NodesScene, comfy_of, running_nodes
from comfyui.server import ComfyServer
from comfyui.workflows import Settings

pytestmark = pytest.mark.timeout(240)

STEPS = 60
LARGE = replace(QUICK, width=256, height=256)  # steps that take longer than to begin at once


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodesScene, ComfyServer]]:
    """The first with the daemon of both, and the second."""
    base = tmp_path_factory.mktemp("two")
    with running_nodes(base / "scene", 2) as scene:
        server = comfy_of(scene.daemon, base / "other")
        # The same files, as two ComfyUIs on one host have them.
        shutil.rmtree(server.base / "models")
        (server.base / "models").symlink_to(scene.server.base / "models")
        with server as other:
            yield scene, other


def result(server: ComfyServer, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and picture, of a run alone."""
    server.run(workflows.text_to_image(SHARED, settings, save="alone"))
    return saved(server, "alone")


def saved(server: ComfyServer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return server.tensors(name)["samples"], server.tensors(f"{name}-image")["images"]


def test_two_at_once(servers: tuple[NodesScene, ComfyServer]) -> None:
    scene, other = servers
    both = (scene.server, other)
    settings = [replace(LARGE, steps=STEPS, seed=seed, prompt=f"{seed}") for seed in (71, 72)]
    alone = [result(server, each) for server, each in zip(both, settings, strict=True)]
    # So that it is not taken from the cache.
    again = [
        workflows.text_to_image(SHARED, replace(each, negative="again"), save="together")
        for each in settings
    ]
    with scene.server.listen() as first, other.listen() as second:
        listeners = (first, second)
        prompts = [
            server.queue(workflow, listener.client_id)
            for server, workflow, listener in zip(both, again, listeners, strict=True)
        ]
        for server, prompt, listener in zip(both, prompts, listeners, strict=True):
            server.wait(prompt)
            listener.wait_until_done(prompt)
        progress = [steps_of(listener.named("progress")) for listener in listeners]
    for server, expected in zip(both, alone, strict=True):
        found = saved(server, "together")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert_fair(*progress)
    assert_one_copy(scene, other)
    # Last, and no test of its own: tests run in any order.
    assert_one_ends_the_other_goes_on(scene, other)


def steps_of(events: list[Event]) -> list[float]:
    """When each step of the sampler was done."""
    return [event.at for event in events if event.data["max"] == STEPS]


def assert_fair(first: list[float], second: list[float]) -> None:
    """While both sampled neither had much more than every other step."""
    begin, end = max(first[0], second[0]), min(first[-1], second[-1])
    counts = [sum(begin <= at <= end for at in times) for times in (first, second)]
    assert min(counts) > STEPS // 4, f"they hardly ran at once: {counts}"
    assert max(counts) < 1.5 * min(counts), counts
    # And nobody waits for long: of the other's steps few come in a row.
    turns = sorted([(at, 0) for at in first] + [(at, 1) for at in second])
    turns = [turn for turn in turns if begin <= turn[0] <= end]
    longest = row = 1
    for (_, one), (_, next_one) in itertools.pairwise(turns):
        row = row + 1 if one == next_one else 1
        longest = max(longest, row)
    assert longest <= 6, f"{longest} steps of one in a row"


def assert_one_copy(scene: NodesScene, other: ComfyServer) -> None:
    """Each component is resident once, and all processes map those very pages."""
    # So that the ranks have the VAE, too.
    scene.server.run(workflows.coding(CODED, QUICK, save="coded"))
    status = scene.daemon.wait_for_status(lambda _: True)
    roles = [component.role for component in status.components]
    assert sorted(roles) == ["clip_l", "t5", "transformer", "vae"]
    pids = {session.session: session.pid for session in status.sessions}
    for component in status.components:
        holders = {pids[session] for session in component.sessions}
        assert {scene.server.pid, other.pid} <= holders
    both = inodes(scene.server.pid)
    assert len(both) == len(status.components)
    assert inodes(other.pid) == both
    assert len(status.ranks) == 2
    for rank in status.ranks:
        found = inodes(rank.pid)
        assert len(found) >= 2  # the transformer, the VAE
        assert found <= both


def inodes(pid: int) -> set[str]:
    """Of the regions that a process maps."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as lines:
        return {line.split()[4] for line in lines if "xdit-sidecar" in line}


def assert_one_ends_the_other_goes_on(scene: NodesScene, other: ComfyServer) -> None:
    settings = replace(QUICK, seed=73)
    expected = result(scene.server, settings)
    long = workflows.text_to_image(SHARED, replace(QUICK, steps=2000, seed=74), picture=False)
    with other.listen() as listener:
        other.queue(long, listener.client_id)
        listener.wait_for(lambda e: e.name == "progress" and e.data["node"] == "sampler")
    other.kill()
    workflow = workflows.text_to_image(SHARED, replace(settings, negative="again"), save="after")
    scene.server.run(workflow)
    found = saved(scene.server, "after")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    status = scene.daemon.wait_for_status(
        lambda s: other.pid not in {session.pid for session in s.sessions}
    )
    assert len(status.components) == 4
