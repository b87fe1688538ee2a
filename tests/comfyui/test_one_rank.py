"""As `test_nodes`, on a single rank: no exchange, and another path through the attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfyui.cases import CASES, SAME, difference
from comfyui.nodes_scene import REMOTE, NodesScene, running_nodes

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodesScene]:
    with running_nodes(tmp_path_factory.mktemp("one-rank") / "scene", 1) as running:
        yield running


@pytest.mark.parametrize("name", CASES)
def test_one_loader_is_replaced(scene: NodesScene, name: str) -> None:
    build, settings = CASES[name]
    assert difference(scene, build, settings, REMOTE) < SAME
