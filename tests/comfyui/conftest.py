"""ComfyUI servers that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfyui import packs
from comfyui.nodes_scene import NodesScene, running_nodes
from comfyui.server import ComfyServer, comfy_environment
from fork_server import fork_server

# What a ComfyUI imports that is not its own and takes long; more than half of its start.
IMPORTS = ("torch", "transformers", "torchsde", "scipy.stats", "aiohttp.web", "PIL.Image")


@pytest.fixture(scope="session", autouse=True)
def _forked_servers() -> Iterator[None]:
    with fork_server("comfyui", IMPORTS, comfy_environment()):
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI that has this project's clone among its custom nodes."""
    base = tmp_path_factory.mktemp("comfyui") / "base"
    with ComfyServer(base, packs={"xdit_sidecar": packs.clone()}) as running:
        yield running


@pytest.fixture(scope="module")
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodesScene]:
    """A ComfyUI with the pack, and a daemon with as many ranks as the module's ``RANKS`` says."""
    with running_nodes(tmp_path_factory.mktemp("nodes") / "scene", request.module.RANKS) as running:
        yield running
