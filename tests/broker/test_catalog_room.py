"""What fits, what goes, and the limits."""

from __future__ import annotations

import pytest
from catalog_scene import GPU, GRANULE, Scene
from xdit_sidecar.daemon.broker import events as e
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import Busy, DeviceUnavailable, OutOfMemory
from xdit_sidecar.protocol.manifest import TensorSpec

# --- the budget


def test_the_least_recently_used_goes_first_and_never_what_is_leased() -> None:
    scene = Scene(budget=4)
    for name in ("leased", "old", "used-again", "young"):
        scene.make_resident(f"holder-of-{name}", name)
    for name in ("old", "used-again", "young"):
        scene.end(f"holder-of-{name}")
    scene.release("s1", scene.lease(scene.attach("s1", "used-again")).lease)

    scene.hand_over("s2", "new")
    assert scene.freed() == ["old"]
    scene.hand_over("s2", "newer", 2)
    assert scene.freed() == ["old", "young", "used-again"]
    scene.settle()
    assert scene.states() == {"leased": "resident", "new": "filling", "newer": "filling"}
    assert scene.catalog.used("cpu") == 4 * GRANULE


def test_a_probe_evicts_nothing_and_takes_little() -> None:
    scene = Scene(budget=2)
    scene.make_resident("s1", "idle", 2)
    scene.end("s1")
    room = limits.PROBE_ROOM // GRANULE
    for number in range(room):
        scene.hand_over("s2", f"nonce:{number}")
    scene.settle()
    assert scene.freed() == []
    refused = scene.error(scene.hand_over("s2", "nonce:one too many"))
    assert isinstance(refused, OutOfMemory)


def test_room_is_freed_before_it_is_taken() -> None:
    scene = Scene(budget=2)
    scene.make_resident("s1", "old", 2)
    scene.end("s1")
    scene.hand_over("s2", "new", 2)
    assert [type(ask) for ask in scene.keepers["cpu"]] == [e.Free, e.Allocate]


def test_nothing_goes_when_that_would_not_suffice() -> None:
    scene = Scene(budget=4)
    scene.make_resident("s1", "leased", 2)
    scene.make_resident("s2", "idle", 2)
    scene.end("s2")
    refused = scene.error(scene.hand_over("s3", "new", 3))
    assert isinstance(refused, OutOfMemory)
    assert scene.freed() == []
    text = str(refused)
    for part in (f"new needs {3 * GRANULE} bytes", f"leased ({2 * GRANULE} bytes, used by s1)"):
        assert part in text
    for option in ("fp8", "CPU", "GPU", "fewer"):
        assert option in text
    assert "idle" not in text


def test_the_refusal_fits_into_a_message_however_long_the_names_are() -> None:
    scene = Scene(budget=20)
    for i in range(20):
        scene.make_resident(f"session-{i}", f"{i}-" + "x" * 200)
    assert len(str(scene.error(scene.hand_over("s", "y" * 256)))) <= limits.TEXT


def test_other_devices_are_left_alone() -> None:
    scene = Scene(("cpu", GPU), budget=1)
    scene.make_resident("s1", "there", device=GPU)
    scene.make_resident("s1", "here")
    scene.end("s1")
    scene.hand_over("s2", "new")
    assert scene.freed() == ["here"]


def test_a_waiter_that_takes_over_is_refused_with_all_others_if_there_is_no_room() -> None:
    scene = Scene(budget=4)
    scene.make_filling("s1", "vae", 2)
    waiting = [scene.hand_over(session, "vae", 2) for session in ("s2", "s3")]
    scene.keeper_ready(budget=1)  # the device was found to have less
    scene.end("s1")
    scene.settle()
    assert all(isinstance(scene.error(asker), OutOfMemory) for asker in waiting)
    assert not scene.catalog.copies


# --- the device has less than the budget says


def test_a_refused_allocation_evicts_and_is_tried_once_more() -> None:
    scene = Scene()
    scene.make_resident("s1", "idle", 2)
    scene.end("s1")
    asker = scene.hand_over("s2", "new", 3)
    scene.keeper_refuses(free=1)
    assert scene.answer(asker) is None
    assert [type(ask) for ask in scene.keepers["cpu"]] == [e.Free, e.Allocate]
    scene.settle()
    assert isinstance(scene.answer(asker), e.GrantFill)
    assert scene.states() == {"new": "filling"}


def test_a_second_refusal_is_final_and_names_holders_bytes_and_options() -> None:
    scene = Scene()
    scene.make_resident("s1", "leased", 2)
    for session in ("s2", "s3"):
        scene.make_resident(session, f"idle-{session}", 1)
        scene.end(session)
    askers = [scene.hand_over(session, "new", 3) for session in ("s4", "s5")]
    scene.keeper_refuses(free=2)
    scene.keeper_answers()
    scene.keeper_refuses(free=2)
    for asker in askers:
        refused = scene.error(asker)
        assert isinstance(refused, OutOfMemory)
        assert f"needs {3 * GRANULE} bytes" in str(refused)
        assert f"{2 * GRANULE} can be had" in str(refused)
        assert "used by s1" in str(refused)
        assert "Options: " in str(refused)
    assert scene.states() == {"leased": "resident", "idle-s3": "resident"}
    assert not scene.keepers["cpu"]


def test_a_refused_allocation_with_nothing_to_evict_is_final() -> None:
    scene = Scene()
    scene.make_resident("s1", "leased", 2)
    asker = scene.hand_over("s2", "new", 3)
    scene.keeper_refuses(free=1)
    assert isinstance(scene.error(asker), OutOfMemory)
    assert scene.states() == {"leased": "resident"}


def test_a_refusal_counts_the_memory_that_is_on_its_way_back() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "given-up", 2)
    scene.make_resident("s2", "idle", 2)
    scene.end("s2")
    asker = scene.hand_over("s3", "new", 2)
    scene.abandon("s1", region)  # asked to be freed after the allocation, so not yet back
    scene.keeper_refuses(free=0)
    scene.settle()
    assert isinstance(scene.answer(asker), e.GrantFill)
    assert scene.freed() == ["given-up"], "nothing had to be evicted"


def test_a_refusal_that_is_not_about_memory_evicts_nothing() -> None:
    scene = Scene()
    scene.make_resident("s1", "idle")
    scene.end("s1")
    askers = [scene.hand_over(session, "new") for session in ("s2", "s3")]
    scene.keeper_refuses(error=DeviceUnavailable("the driver is stuck"))
    assert all(isinstance(scene.error(asker), DeviceUnavailable) for asker in askers)
    assert scene.states() == {"idle": "resident"}


@pytest.mark.parametrize("how", ["end", "cancel"])
def test_nothing_is_evicted_for_an_asker_that_is_gone(how: str) -> None:
    scene = Scene()
    scene.make_resident("s1", "idle", 2)
    scene.end("s1")
    asker = scene.hand_over("s2", "new", 2)
    scene.end("s2") if how == "end" else scene.cancel(asker)
    scene.keeper_refuses(free=0)
    assert scene.freed() == []
    assert scene.states() == {"idle": "resident"}
    assert scene.answer(asker) is None


# --- idle time


def test_idle_components_go_after_their_time() -> None:
    scene = Scene(idle_seconds=10)
    scene.make_resident("s1", "leased")
    scene.make_resident("s2", "idle")
    scene.end("s2")
    ended = scene.now
    scene.now = ended + 8
    scene.do(e.Ticked())
    assert scene.freed() == []
    scene.do(e.Ticked())
    assert scene.freed() == ["idle"]
    scene.settle()
    assert scene.states() == {"leased": "resident"}


def test_without_an_idle_time_components_stay() -> None:
    scene = Scene()
    scene.make_resident("s1", "idle")
    scene.end("s1")
    scene.now += 1e9
    scene.do(e.Ticked())
    assert scene.states() == {"idle": "resident"}


# --- limits


def test_leases_of_one_session_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEASES_PER_SESSION", 3)
    scene = Scene()
    lease = scene.make_resident("s1", "vae")
    for _ in range(2):
        scene.lease(scene.attach("s1", "vae"))
    for refused in (
        scene.attach("s1", "vae"),
        scene.hand_over("s1", "vae"),
        scene.hand_over("s1", "new"),
    ):
        assert isinstance(scene.error(refused), Busy)
    assert scene.lease(scene.attach("s2", "vae"))
    scene.release("s1", lease)
    assert scene.lease(scene.attach("s1", "vae"))


def test_waiters_of_one_component_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WAITERS_PER_COMPONENT", 2)
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiting = [scene.hand_over(session, "vae") for session in ("s2", "s3")]
    refused = scene.error(scene.hand_over("s4", "vae"))
    assert isinstance(refused, Busy)
    assert refused.retryable
    scene.commit("s1", region)
    scene.settle()
    assert all(scene.lease(asker) for asker in waiting)
    assert scene.lease(scene.hand_over("s4", "vae"))


def test_components_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMPONENTS", 2)
    scene = Scene()
    scene.make_resident("s1", "a")
    scene.make_filling("s1", "b")
    assert isinstance(scene.error(scene.hand_over("s1", "c")), Busy)
    assert scene.lease(scene.hand_over("s2", "a"))
    scene.end("s1")
    scene.settle()
    assert scene.make_filling("s1", "c")


def test_idle_components_make_place_for_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMPONENTS", 2)
    scene = Scene()
    for name in ("old", "young"):
        scene.make_resident("s1", name)
    scene.end("s1")
    scene.make_filling("s2", "new")
    assert scene.freed() == ["old"]


def test_tensors_of_all_components_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CATALOG_TENSORS", 5)
    scene = Scene()

    def table(count: int) -> list[TensorSpec]:
        return [TensorSpec(str(i), "U8", [1]) for i in range(count)]

    scene.hand_over("s1", "a", tensors=table(3))
    refused = scene.error(scene.hand_over("s1", "b", tensors=table(3)))
    assert isinstance(refused, Busy)
    assert "evict" in str(refused)
    scene.hand_over("s1", "b", tensors=table(2))
    assert set(scene.states()) == {"a", "b"}
