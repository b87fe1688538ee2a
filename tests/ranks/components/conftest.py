"""A nursery of ranks for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks.parallel.harness import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Ranks that have xfuser, repaired: as they are when they decode."""
    made = Nursery(tmp_path_factory.mktemp("vae-ranks") / "loaded", loaded=True)
    yield made
    made.close()
