"""Daemons with ranks, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks_scene import RanksScene, User, running_ranks


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RanksScene]:
    """Two ranks."""
    directory = tmp_path_factory.mktemp("two-ranks")
    with running_ranks(directory, 2, "--deadline", "30", "--budget", "64MiB") as running:
        yield running


@pytest.fixture(scope="session")
def lone_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RanksScene]:
    """One rank."""
    directory = tmp_path_factory.mktemp("one-rank")
    with running_ranks(directory, 1, "--deadline", "30") as running:
        yield running


@pytest.fixture
def user(scene: RanksScene) -> Iterator[User]:
    """A client of the two ranks, with the small FLUX.1."""
    with scene.user() as made:
        yield made


@pytest.fixture(autouse=True)
def _no_restart(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a client does, the ranks of the shared daemon live through it."""
    if "scene" not in request.fixturenames:
        yield
        return
    running = request.getfixturevalue("scene")
    running.wait_until_ready()  # again, if the test before has failed
    before = running.rank_pids
    yield
    assert running.rank_pids == before, running.daemon.log
