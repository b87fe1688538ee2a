"""What PipeFusion keeps in the ranks goes with what it was kept for."""

from __future__ import annotations

from ranks.parallel.harness import Nursery, values


def test_kept_runs_go_with_what_they_were_kept_for(nursery: Nursery) -> None:
    first, second = values(nursery.run("keep_runs", 2))
    assert first == second
    (warm, new), (stale, more) = first.pop("asked")
    assert new > 0
    assert (stale, more) == (
        warm - new,
        0,
    )  # the second step keeps what the first has made room for
    assert first == {
        "forward": 1,
        "session ended": 0,
        "picture in progress": 1,
        "trimmed": 1,
        "short": "out-of-memory",
        "after shortage": 1,
        "picture dropped": 0,
        "picture ended": 0,
        "failed": "bad-job",
        "picture failed": 0,
    }
