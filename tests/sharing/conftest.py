"""What the clients of all tests here are forked from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fork_server import fork_server
from processes import client_environment


@pytest.fixture(scope="session", autouse=True)
def _forked_clients() -> Iterator[None]:
    with fork_server("client", ["client_program"], client_environment()):
        yield
