"""As `test_nodes`, on a single rank: no exchange, and another path through the attention."""

from __future__ import annotations

import pytest
from comfyui.cases import ALL_THERE, CASES, HERE, SAME, WHOLE, difference, sampler_difference
from comfyui.nodes_scene import REMOTE, NodesScene

pytestmark = pytest.mark.timeout(240)


RANKS = 1


@pytest.mark.parametrize("name", CASES)
def test_one_loader_is_replaced(scene: NodesScene, name: str) -> None:
    build, settings = CASES[name]
    assert difference(scene, build, settings, REMOTE) < SAME


@pytest.mark.parametrize("name", WHOLE)
def test_our_sampler_as_well(scene: NodesScene, name: str) -> None:
    found, told = sampler_difference(scene, name)
    assert found < SAME
    assert told.startswith(ALL_THERE if WHOLE[name] else HERE)
