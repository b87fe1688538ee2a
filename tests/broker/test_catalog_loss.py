"""Keepers that die and requests that are withdrawn, in every state of a component."""

from __future__ import annotations

import pytest
from catalog_scene import GPU, GRANULE, Scene
from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.protocol.errors import FillLost, SidecarError, UnknownComponent


def must_retry(error: SidecarError) -> None:
    assert isinstance(error, FillLost)
    assert error.retryable


# --- the keeper dies


def test_keeper_lost_while_allocating() -> None:
    scene = Scene()
    askers = [scene.hand_over(session, "vae") for session in ("s1", "s2")]
    scene.keeper_lost()
    for asker in askers:
        must_retry(scene.error(asker))
    assert scene.orphaned == [], "nobody was told of the region yet"
    assert not scene.catalog.copies


def test_keeper_lost_while_filling() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting = scene.hand_over("s2", "vae")
    scene.keeper_lost()
    must_retry(scene.error(waiting))
    assert scene.orphaned == [e.NotifyOrphaned("s1", region)]
    assert not scene.catalog.copies
    must_retry(scene.error(scene.commit("s1", region)))


def test_keeper_lost_while_sealing() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting, committed = scene.hand_over("s2", "vae"), scene.commit("s1", region)
    scene.keeper_lost()
    must_retry(scene.error(waiting))
    must_retry(scene.error(committed))
    assert not scene.catalog.copies
    scene.do(e.RegionSealed(region))  # the answer was on its way when the keeper died
    assert not scene.catalog.copies


def test_keeper_lost_while_resident_and_nobody_leases() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.end("s1")
    scene.keeper_lost()
    assert not scene.catalog.copies
    assert scene.orphaned == []
    assert scene.freed() == []


def test_keeper_lost_while_freeing_confirms_that_it_is_gone() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.end("s1")
    evicted = scene.evict("s2", "vae")
    scene.keeper_lost()
    assert scene.answer(evicted) == e.Confirm(evicted)
    assert not scene.catalog.copies


def test_keeper_lost_while_leased_leaves_an_orphan_until_the_last_lease_goes() -> None:
    scene = Scene(budget=4)
    first = scene.make_resident("s1", "vae", 2)
    scene.attach("s2", "vae")
    scene.attach("s2", "vae")
    region = scene.copies("vae")[0].region
    scene.keeper_lost()
    assert {(told.session, told.region) for told in scene.orphaned} == {
        ("s1", region),
        ("s2", region),
    }
    assert len(scene.orphaned) == 2
    assert scene.states() == {"vae": "orphaned"}
    assert scene.catalog.used("cpu") == 2 * GRANULE

    scene.keeper_ready(budget=4)
    assert isinstance(scene.error(scene.attach("s3", "vae")), UnknownComponent)
    assert isinstance(scene.error(scene.evict("s3", "vae")), UnknownComponent)
    fresh = scene.make_filling("s1", "vae", 2)
    assert fresh != region
    assert scene.catalog.used("cpu") == 4 * GRANULE, "the orphan's bytes are still taken"
    assert scene.error(scene.hand_over("s3", "more")).code == "out-of-memory"

    scene.commit("s1", fresh)
    scene.settle()
    scene.answer(scene.release("s1", first))
    assert len(scene.copies("vae")) == 2
    scene.end("s2")
    assert [copy.region for copy in scene.copies("vae")] == [fresh]
    assert scene.catalog.used("cpu") == 2 * GRANULE
    assert scene.freed() == [], "its keeper cannot free it any more"


def test_a_second_loss_leaves_the_first_orphan_as_it_is() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.keeper_lost()
    scene.keeper_ready()
    scene.make_resident("s1", "vae")
    scene.keeper_lost()
    assert [copy.state for copy in scene.copies("vae")] == ["orphaned", "orphaned"]
    assert len(scene.orphaned) == 2
    scene.end("s1")
    assert not scene.catalog.copies


def test_the_other_devices_go_on() -> None:
    scene = Scene(("cpu", GPU))
    lease = scene.make_resident("s1", "vae")
    scene.keeper_lost(GPU)
    assert scene.states() == {"vae": "resident"}
    assert scene.answer(scene.release("s1", lease))


def test_nothing_is_evicted_from_a_device_without_a_keeper() -> None:
    scene = Scene(idle_seconds=1)
    scene.make_resident("s1", "vae")
    scene.keeper_lost()
    scene.now += 100
    scene.do(e.Ticked())
    assert scene.freed() == []
    assert scene.states() == {"vae": "orphaned"}


# --- requests that are withdrawn


def test_cancelled_while_waiting() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting = scene.hand_over("s2", "vae")
    scene.cancel(waiting)
    scene.commit("s1", region)
    scene.settle()
    assert scene.answer(waiting) is None
    assert scene.catalog.leases_of("s2") == 0


def test_cancelled_while_allocating() -> None:
    scene = Scene()
    asker = scene.hand_over("s1", "vae")
    scene.cancel(asker)
    scene.settle()
    assert scene.answer(asker) is None
    assert scene.freed() == ["vae"]
    assert not scene.catalog.copies


def test_cancelled_while_allocating_and_another_waits() -> None:
    scene = Scene()
    asker, waiting = scene.hand_over("s1", "vae"), scene.hand_over("s1", "vae")
    scene.cancel(asker)
    scene.settle()
    assert scene.answer(asker) is None
    assert isinstance(scene.answer(waiting), e.GrantFill)


def test_cancelled_when_the_grant_was_on_its_way() -> None:
    scene = Scene()
    asker, waiting = scene.hand_over("s1", "vae"), scene.hand_over("s2", "vae")
    scene.settle()
    fill = scene.answer(asker)
    assert isinstance(fill, e.GrantFill)
    scene.cancel(asker)
    scene.settle()
    assert scene.freed() == ["vae"]
    taken_over = scene.answer(waiting)
    assert isinstance(taken_over, e.GrantFill)
    assert taken_over.region != fill.region
    assert isinstance(scene.error(scene.commit("s1", taken_over.region)), UnknownComponent)


def test_cancelled_commit_while_sealing() -> None:
    scene = Scene()
    committed = scene.commit("s1", scene.make_filling("s1", "vae"))
    scene.cancel(committed)
    scene.settle()
    assert scene.answer(committed) is None
    assert scene.states() == {"vae": "resident"}
    assert scene.catalog.leases_of("s1") == 0


@pytest.mark.parametrize("ask", ["commit", "hand_over", "attach"])
def test_cancelled_when_the_lease_was_on_its_way(ask: str) -> None:
    scene = Scene()
    scene.make_resident("other", "vae")
    kept = scene.lease(scene.attach("s1", "vae"))
    if ask == "commit":
        asker = scene.commit("s1", scene.make_filling("s1", "new"))
        scene.settle()
    else:
        asker = getattr(scene, ask)("s1", "vae")
    granted = scene.lease(asker)
    scene.cancel(asker)
    assert scene.catalog.leases_of("s1") == 1
    assert isinstance(scene.error(scene.release("s1", granted.lease)), UnknownComponent)
    assert scene.answer(scene.release("s1", kept.lease))


@pytest.mark.parametrize("how", ["end", "cancel"])
def test_withdrawn_while_freeing_is_not_answered(how: str) -> None:
    # Its number may be in use again by then.
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.end("s1")
    evicted = scene.evict("s2", "vae")
    scene.end("s2") if how == "end" else scene.cancel(evicted)
    scene.settle()
    assert scene.answer(evicted) is None
    assert scene.freed() == ["vae"]


def test_only_the_asker_itself_is_withdrawn() -> None:
    scene = Scene()
    asker = scene.hand_over("s1", "vae")
    scene.cancel(e.Asker("s2", asker.request))
    scene.cancel(e.Asker("s1", asker.request + 1))
    scene.settle()
    assert isinstance(scene.answer(asker), e.GrantFill)


def test_cancelling_what_was_refused_changes_nothing() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    refused = scene.attach("s2", "nothing")
    before = scene.states()
    scene.cancel(refused)
    assert scene.states() == before
