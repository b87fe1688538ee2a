"""Contexts, deadlines and ports of ranks, and PipeFusion's steps."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from ranks.parallel.exactness import PIPEFUSION, drift
from ranks.parallel.harness import Nursery, values

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed"
)
TWO = [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}]
DEADLINE = 2.0  # seconds
GRACE = 2.0  # past a deadline


def test_contexts_switch_in_no_time_around_one_set_of_weights(nursery: Nursery) -> None:
    for found in values(nursery.run("switch_contexts", 2, configs=TWO)):
        assert found["median_switch"] < 1e-3  # a busy machine may interrupt one
        assert found["later"] == found["first"] * 3
        assert found["more_groups"] == 0
        assert found["groups_alone"] <= 2  # one named gloo, one by default; threads for each
        assert found["weights_unchanged"]
        assert found["weights_in_place"]


def test_silent_rank_is_noticed_in_every_context(nursery: Nursery) -> None:
    configs = [*TWO, {"pipefusion": 2}]
    waits, _ = values(nursery.run("meet_silence", 2, configs=configs, deadline=DEADLINE))
    assert len(waits) == len(configs)
    assert max(waits) < DEADLINE + GRACE


@pytest.mark.parametrize("degrees", [*TWO, {"pipefusion": 2}], ids=str)
def test_dead_rank_is_noticed_at_once(nursery: Nursery, degrees: dict[str, int]) -> None:
    arguments = {"configs": [degrees], "deadline": 30.0, "die": True}
    survivor, dead = nursery.run("meet_silence", 2, **arguments)
    assert dead.status == "died"
    assert max(survivor.get()) < GRACE


def test_later_deadline_holds_for_collectives(nursery: Nursery) -> None:
    arguments = {"configs": TWO, "deadline": 30.0, "later_deadline": DEADLINE}
    waits, _ = values(nursery.run("meet_silence", 2, **arguments))
    assert max(waits) < DEADLINE + GRACE


def test_every_process_group_has_the_deadline(nursery: Nursery) -> None:
    for found in values(nursery.run("keep_deadline", 2, deadline=17.0)):
        *others, groups = found
        assert not others
        assert groups > 20


def test_nobody_comes(nursery: Nursery) -> None:
    (waited,) = values(nursery.run("meet_alone", 1, deadline=DEADLINE))
    assert waited < DEADLINE + GRACE


def test_no_port_can_be_reached_from_outside(nursery: Nursery) -> None:
    for addresses in values(nursery.run("list_open_ports", 2)):
        assert addresses, "gloo has no socket: this test looks in the wrong place"
        assert set(addresses) == {"0100007F"}  # 127.0.0.1


@pytest.mark.parametrize(("ranks", "arguments"), PIPEFUSION.values(), ids=PIPEFUSION)
def test_pipefusion_steps(nursery: Nursery, ranks: int, arguments: dict[str, Any]) -> None:
    first, *others = values(nursery.run("run_pipefusion", ranks, **arguments))
    for other in others:
        assert other == first
    assert first["warm"] == [True, False, False, False]
    assert max(first["warm_errors"]) < 1e-5
    assert first["errors"][0] < 1e-5
    drifted, hardly_drifted = drift(first)
    assert 1e-4 < drifted < first["no_update"]
    # What is stale is stale by one step: where that is tiny, so is the drift. (A ten-thousandth:
    # to random weights the embeddings of timesteps 1000 and 996 are as good as unrelated.)
    assert hardly_drifted < drifted / 100
    assert not first["nan"]
    assert first["interleaved"] == first["outputs"]
    assert first["interleaved_two"] == first["alone_two"]
    assert not first["warm_when"].pop("sigma falls")
    assert all(first["warm_when"].values()), first["warm_when"]
    assert first["weights_unchanged"]
    assert first["blocks_in_place"]


def test_ranks_record_together(nursery: Nursery) -> None:
    # None before all are ready; and not what is exchanged by USP, for want of even shares.
    runs = [([64, 16], 5), ([63, 13], 4)]
    expected = [0, 0, 0, 1, 1, 1, 1, 1, 1]
    for found in values(nursery.run("record_shares", 2, runs=runs, later=2)):
        assert found == {"same": [True] * 9, "recorded": expected, "refusal": None}
