"""The life of a component: handed over, filled, sealed, leased, given up by its filler."""

from __future__ import annotations

import pytest
from catalog_scene import GPU, GRANULE, Scene
from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.protocol.errors import (
    DeviceUnavailable,
    FillLost,
    InUse,
    ManifestMismatch,
    StillMapped,
    UnknownComponent,
    UnknownDevice,
)
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.messages import Component

# --- one copy


def test_two_hand_overs_at_once_end_with_one_copy() -> None:
    scene = Scene()
    first = scene.hand_over("s1", "vae", 2)
    second = scene.hand_over("s2", "vae", 2)
    assert [type(ask) for ask in scene.sent] == [e.Allocate]
    scene.settle()
    fill = scene.answer(first)
    assert isinstance(fill, e.GrantFill)
    assert fill.nbytes == 2 * GRANULE
    assert scene.answer(second) is None

    committed = scene.commit("s1", fill.region)
    assert scene.answer(committed) is None
    assert scene.answer(second) is None, "leased before the region was sealed"
    scene.settle()
    one, two = scene.lease(committed), scene.lease(second)
    assert one.region == two.region == fill.region
    assert one.lease != two.lease
    assert [type(ask) for ask in scene.sent] == [e.Allocate, e.Seal]
    assert scene.states() == {"vae": "resident"}
    assert (scene.catalog.leases_of("s1"), scene.catalog.leases_of("s2")) == (1, 1)


def test_a_resident_component_is_leased_at_once() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    handed_over, attached = scene.hand_over("s2", "vae"), scene.attach("s3", "vae")
    assert scene.lease(handed_over).region == scene.lease(attached).region
    assert scene.copies("vae")[0].holders == ["s1", "s2", "s3"]


def test_devices_and_trust_domains_have_copies_of_their_own() -> None:
    scene = Scene(("cpu", GPU))
    for more in ({}, {"device": GPU}, {"domain": "others"}):
        scene.make_resident("s1", "vae", **more)
    assert len(scene.copies("vae")) == 3
    assert scene.catalog.used("cpu") == 2 * GRANULE
    assert scene.catalog.used(GPU) == GRANULE
    unknown = scene.attach("s2", "vae", domain="strangers")
    assert isinstance(scene.error(unknown), UnknownComponent)


def test_another_table_under_the_same_fingerprint_is_refused() -> None:
    scene = Scene()
    other = [TensorSpec("weight", "F16", [GRANULE // 2])]
    filling = scene.make_filling("s1", "vae")
    assert isinstance(scene.error(scene.hand_over("s2", "vae", tensors=other)), ManifestMismatch)
    scene.commit("s1", filling)
    scene.settle()
    assert isinstance(scene.error(scene.hand_over("s2", "vae", tensors=other)), ManifestMismatch)
    assert len(scene.copies("vae")) == 1


def test_a_table_that_makes_no_sense_is_refused() -> None:
    scene = Scene()
    refused = scene.hand_over("s1", "vae", tensors=[TensorSpec("weight", "F99", [1])])
    assert scene.error(refused).code == "bad-message"
    assert not scene.catalog.copies


def test_devices_that_are_unknown_or_have_no_keeper() -> None:
    scene = Scene()
    for ask in (scene.hand_over, scene.attach):
        refused = scene.error(ask("s1", "vae", device=GPU))
        assert isinstance(refused, UnknownDevice)
        assert "cpu" in str(refused)
    scene.keeper_lost()
    for ask in (scene.hand_over, scene.attach):
        refused = scene.error(ask("s1", "vae"))
        assert isinstance(refused, DeviceUnavailable)
        assert refused.retryable
    scene.keeper_ready()
    assert scene.make_filling("s1", "vae")


def test_attaching_never_makes_a_filler() -> None:
    scene = Scene()
    assert isinstance(scene.error(scene.attach("s1", "vae")), UnknownComponent)
    scene.hand_over("s1", "vae")
    assert isinstance(scene.error(scene.attach("s2", "vae")), UnknownComponent)
    scene.settle()
    assert isinstance(scene.error(scene.attach("s2", "vae")), UnknownComponent)


# --- the filler goes


def test_filler_ends_while_filling_and_a_waiter_gets_a_fresh_region() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    second, third = scene.hand_over("s2", "vae"), scene.hand_over("s3", "vae")
    scene.end("s1")
    assert scene.sent[-2:] == [
        e.Free("cpu", region),
        e.Allocate("cpu", scene.sent[-1].region, GRANULE),
    ]
    scene.settle()
    fill = scene.answer(second)
    assert isinstance(fill, e.GrantFill)
    assert fill.region != region, "the old filler may still have its region mapped writable"
    assert scene.answer(third) is None
    committed = scene.commit("s2", fill.region)
    scene.settle()
    assert scene.lease(committed).region == scene.lease(third).region == fill.region
    assert scene.catalog.used("cpu") == GRANULE


def test_filler_ends_without_a_waiter_and_nothing_is_left() -> None:
    scene = Scene()
    scene.make_filling("s1", "vae")
    scene.end("s1")
    assert scene.catalog.used("cpu") == 0
    scene.settle()
    assert scene.freed() == ["vae"]
    assert not scene.catalog.copies


def test_filler_ends_while_its_region_is_allocated() -> None:
    scene = Scene()
    first, second = scene.hand_over("s1", "vae"), scene.hand_over("s2", "vae")
    scene.end("s1")
    scene.settle()
    assert scene.answer(first) is None
    fill = scene.answer(second)
    assert isinstance(fill, e.GrantFill)
    assert scene.catalog.fill_of("s2", fill.region)
    scene.end("s2")
    scene.settle()
    assert not scene.catalog.copies


def test_filler_ends_while_sealing_and_what_it_committed_stays() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    committed, waiting = scene.commit("s1", region), scene.hand_over("s2", "vae")
    scene.end("s1")
    scene.settle()
    assert scene.answer(committed) is None
    assert scene.lease(waiting).region == region
    assert scene.catalog.leases_of("s1") == 0


@pytest.mark.parametrize("how", ["end", "cancel"])
def test_filler_is_gone_when_sealing_is_refused(how: str) -> None:
    # Nobody would ever commit the region again: whoever waits must not wait for it.
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    committed, waiting = scene.commit("s1", region), scene.hand_over("s2", "vae")
    scene.end("s1") if how == "end" else scene.cancel(committed)
    scene.keeper_refuses(error=StillMapped("a map is open"))
    scene.settle()
    assert scene.answer(committed) is None
    fill = scene.answer(waiting)
    assert isinstance(fill, e.GrantFill)
    assert fill.region != region
    assert scene.freed() == ["vae"]


def test_a_refused_seal_leaves_the_filler_its_region() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting, committed = scene.hand_over("s2", "vae"), scene.commit("s1", region)
    scene.keeper_refuses(error=StillMapped("a map is open"))
    assert isinstance(scene.error(committed), StillMapped)
    assert scene.answer(waiting) is None
    again = scene.commit("s1", region)
    scene.settle()
    assert scene.lease(again).region == scene.lease(waiting).region == region


def test_abandoning_is_confirmed_when_freed_and_a_waiter_takes_over() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting, abandoned = scene.hand_over("s2", "vae"), scene.abandon("s1", region)
    assert scene.answer(abandoned) is None
    scene.keeper_answers()
    assert scene.answer(abandoned) == e.Confirm(abandoned)
    scene.settle()
    assert isinstance(scene.answer(waiting), e.GrantFill)


def test_a_session_that_filled_several_gives_all_their_room_to_waiters() -> None:
    scene = Scene(budget=4)
    scene.make_filling("s1", "a", 2)
    scene.make_filling("s1", "b", 2)
    waiting = [scene.hand_over("s2", "a", 2), scene.hand_over("s3", "b", 2)]
    scene.end("s1")
    scene.settle()
    assert [type(scene.answer(asker)) for asker in waiting] == [e.GrantFill, e.GrantFill]


def test_the_leases_of_an_ended_filler_make_room_for_the_waiter() -> None:
    # The order in which one session's copies are looked at must not decide who is refused.
    scene = Scene(budget=4)
    scene.make_filling("s1", "new", 2)
    scene.make_resident("s1", "old", 2)
    waiting = scene.hand_over("s2", "new", 2)
    scene.end("s1")
    scene.settle()
    assert isinstance(scene.answer(waiting), e.GrantFill)
    assert scene.states()["old"] == "resident", "there was room without evicting it"


# --- leases


def test_leases_end_with_their_session_and_the_component_stays() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.attach("s1", "vae")
    kept = scene.lease(scene.attach("s2", "vae"))
    scene.end("s1")
    assert scene.catalog.leases_of("s1") == 0
    assert list(scene.copies("vae")[0].leases) == [kept.lease]
    scene.end("s2")
    assert scene.states() == {"vae": "resident"}
    assert scene.freed() == []
    assert scene.lease(scene.attach("s3", "vae"))


def test_releasing_twice_is_refused_the_second_time() -> None:
    scene = Scene()
    lease = scene.make_resident("s1", "vae")
    released = scene.release("s1", lease)
    assert scene.answer(released) == e.Confirm(released)
    assert isinstance(scene.error(scene.release("s1", lease)), UnknownComponent)
    assert scene.copies("vae")[0].holders == []


def test_nothing_of_one_session_can_be_used_by_another() -> None:
    scene = Scene()
    lease = scene.make_resident("s1", "vae")
    region = scene.make_filling("s1", "transformer")
    for refused in (
        scene.release("s2", lease),
        scene.commit("s2", region),
        scene.abandon("s2", region),
        scene.commit("s1", scene.copies("vae")[0].region),  # sealed: nothing to commit
        scene.abandon("s1", scene.copies("vae")[0].region),
    ):
        assert isinstance(scene.error(refused), UnknownComponent)
    with pytest.raises(UnknownComponent):
        scene.catalog.fill_of("s2", region)
    assert scene.states() == {"vae": "resident", "transformer": "filling"}
    assert scene.catalog.leases_of("s1") == 1


def test_a_commit_of_no_known_region_may_be_retried_as_a_hand_over() -> None:
    scene = Scene()
    refused = scene.error(scene.commit("s1", "f" * 32))
    assert isinstance(refused, FillLost)
    assert refused.retryable


# --- eviction on request


def test_eviction_on_request_is_confirmed_only_when_freed() -> None:
    scene = Scene()
    scene.make_resident("s1", "vae")
    scene.attach("s2", "vae")
    refused = scene.error(scene.evict("s3", "vae"))
    assert isinstance(refused, InUse)
    assert "s1, s2" in str(refused)
    scene.end("s1")
    scene.end("s2")
    evicted = scene.evict("s3", "vae")
    assert scene.answer(evicted) is None
    assert isinstance(scene.error(scene.attach("s1", "vae")), UnknownComponent)
    assert isinstance(scene.error(scene.evict("s4", "vae")), UnknownComponent)
    scene.keeper_answers()
    assert scene.answer(evicted) == e.Confirm(evicted)
    assert not scene.catalog.copies


def test_what_is_not_resident_cannot_be_evicted() -> None:
    scene = Scene()
    assert isinstance(scene.error(scene.evict("s1", "vae")), UnknownComponent)
    scene.make_filling("s1", "vae")
    assert isinstance(scene.error(scene.evict("s1", "vae")), UnknownComponent)
    assert isinstance(scene.error(scene.evict("s2", "vae", domain="others")), UnknownComponent)
    assert scene.states() == {"vae": "filling"}


def test_a_hand_over_during_an_eviction_gets_a_copy_of_its_own() -> None:
    scene = Scene(budget=1)
    scene.make_resident("s1", "vae")
    scene.end("s1")
    evicted, asker = scene.evict("s2", "vae"), scene.hand_over("s3", "vae")
    assert sorted(copy.state for copy in scene.copies("vae")) == ["allocating", "freeing"]
    scene.settle()
    assert scene.answer(evicted) == e.Confirm(evicted)
    assert isinstance(scene.answer(asker), e.GrantFill)
    assert scene.states() == {"vae": "filling"}


def test_the_log_says_what_happened_and_names_no_region() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    notes = scene.do(e.SessionEnded("s1"))
    (note,) = [n for n in notes if isinstance(n, e.Note)]
    assert (note.event, dict(note.facts)["reason"]) == ("component-dropped", "filler-gone")
    assert region not in repr(note)
    granted = e.GrantLease(e.Asker("s1", 1), "cpu", region, 1, "f" * 32, _component())
    assert "weights-table" not in repr(granted)


def _component() -> Component:
    tensors = [TensorSpec("weights-table", "U8", [1])]
    return Component(fingerprint="file:" + "0" * 64, role="vae", label="a", tensors=tensors)
