"""Nurseries of ranks, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks.parallel.harness import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Ranks that have xfuser, repaired."""
    made = Nursery(tmp_path_factory.mktemp("ranks") / "loaded", loaded=True)
    yield made
    made.close()


@pytest.fixture(scope="session")
def bare_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Ranks that have yet to load xfuser."""
    made = Nursery(tmp_path_factory.mktemp("ranks") / "bare", loaded=False)
    yield made
    made.close()
