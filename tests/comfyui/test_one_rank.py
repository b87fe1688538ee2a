"""As `test_nodes`, on a single rank: no exchange, and another path through the attention."""

from __future__ import annotations

import pytest
from comfyui.cases import CASES, SAME, difference
from comfyui.nodes_scene import REMOTE, NodesScene

pytestmark = pytest.mark.timeout(240)


RANKS = 1


@pytest.mark.parametrize("name", CASES)
def test_one_loader_is_replaced(scene: NodesScene, name: str) -> None:
    build, settings = CASES[name]
    assert difference(scene, build, settings, REMOTE) < SAME
