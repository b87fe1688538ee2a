"""One latent decoded by several ranks, against one process."""

from __future__ import annotations

import importlib.util

import pytest
from ranks.parallel.harness import Nursery, values

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed"
)


@pytest.mark.parametrize(("ranks", "heights"), [(1, [3]), (2, [1, 2, 7, 8]), (4, [3, 4, 9])])
def test_the_picture_is_that_of_one_process(
    nursery: Nursery, ranks: int, heights: list[int]
) -> None:
    for found in values(nursery.run("decode_together", ranks, heights=heights)):
        print(found)
        assert max(found["errors"]) < 2e-5
        assert found["tiled"] < 2e-5
        assert found["bf16 together"] < 1.5 * found["bf16 alone"] < 0.1
        assert found["copies"] == 0
        assert (found["parameters"] > 0) == (ranks > 1)
        assert found["unmoved"]
