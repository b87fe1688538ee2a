"""How soon a prompt in a real ComfyUI ends when somebody presses the button, or the daemon dies."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from comfyui import workflows
from comfyui.nodes_scene import QUICK, REMOTE, NodesScene, running_nodes
from figures import Figure, percentile

ROUNDS = 20
# Forwards that take a large part of a second, so that the button is pressed in the middle of one.
_LONG = replace(QUICK, steps=2000, width=1024, height=1024)


def measure() -> list[Figure]:
    """From the POST to the last word about the prompt on the WebSocket, and till ranks are free."""
    released, freed = [], []
    with (
        tempfile.TemporaryDirectory() as name,
        running_nodes(Path(name, "scene"), 1) as scene,
        scene.daemon.client("bench") as client,
    ):

        def ranks_are_free() -> bool:
            group = client.status().group
            return group is not None and not group.jobs

        for seed in range(ROUNDS):
            began, seconds = _end(scene, seed, scene.server.interrupt)
            released.append(seconds)
            while not ranks_are_free():
                time.sleep(0.002)
            freed.append(time.monotonic() - began)
        _, failed = _end(scene, ROUNDS, lambda: os.kill(scene.daemon.pid, signal.SIGKILL))
    return [
        Figure(
            *("interrupt until the prompt is released p50", percentile(released, 50) * 1e3),
            *("ms", 100.0),
        ),
        # Without a threshold: after a prompt, every ten seconds at most, ComfyUI collects garbage,
        # and what it has to say about the prompt waits for that.
        Figure("interrupt until the prompt is released p90", percentile(released, 90) * 1e3, "ms"),
        Figure("interrupt until the ranks are free p50", percentile(freed, 50) * 1e3, "ms"),
        Figure("daemon killed until the prompt fails", failed, "s", 3.0),
    ]


def _end(scene: NodesScene, seed: int, end: Callable[[], object]) -> tuple[float, float]:
    """(When, seconds that it took) to end a prompt that samples by calling ``end``."""
    workflow = workflows.text_to_image(REMOTE, replace(_LONG, seed=seed), picture=False)
    with scene.server.listen() as listener:
        prompt = scene.server.queue(workflow, listener.client_id)
        # Of the sampler: loaders have progress bars, too.
        step = listener.wait_for(lambda e: e.name == "progress" and e.data["node"] == "sampler")
        assert step.data["value"] < _LONG.steps
        time.sleep(random.random() * 0.2)
        began = time.monotonic()
        end()
        ended = listener.wait_until_done(prompt)
    return began, ended.at - began
