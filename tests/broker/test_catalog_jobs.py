"""What the catalog does for jobs: finding, making room, and having orphans unmapped."""

from __future__ import annotations

from catalog_scene import GPU, Scene, key
from xdit_sidecar.daemon.broker import events as e


def unmapped(instructions: list[e.Instruction]) -> list[str]:
    return [one.region for one in instructions if isinstance(one, e.Unmap)]


def test_only_what_is_resident_is_found() -> None:
    scene = Scene()
    assert scene.catalog.use(1, key("a")) is None
    region = scene.make_filling("s1", "a")
    assert scene.catalog.use(1, key("a")) is None
    commit = scene.commit("s1", region)
    assert scene.catalog.use(1, key("a")) is None
    scene.settle()
    found = scene.catalog.use(1, key("a"))
    assert found is not None
    assert found.region == scene.lease(commit).region
    assert scene.catalog.use(1, key("a", domain="other")) is None
    assert scene.catalog.use(1, key("a", device=GPU)) is None


def test_a_job_counts_as_use() -> None:
    scene = Scene(budget=2, idle_seconds=10)
    scene.make_resident("s1", "used", 1)
    scene.make_resident("s1", "idle", 1)
    scene.end("s1")
    assert scene.catalog.use(scene.now + 8, key("used")) is not None
    scene.now += 10
    scene.do(e.Ticked())
    assert scene.freed() == ["idle"]
    scene.settle()
    assert scene.states() == {"used": "resident"}


def test_room_is_made_of_everything_that_nobody_leases() -> None:
    scene = Scene(budget=10)
    for name in ("leased", "idle", "kept"):
        scene.make_resident(f"holder-of-{name}", name)
    scene.end("holder-of-idle")
    scene.end("holder-of-kept")
    scene.make_filling("s9", "filling")
    (kept,) = scene.copies("kept")
    scene.do(e.RoomWanted("cpu", frozenset({kept.region})))
    assert scene.freed() == ["idle"]
    assert scene.catalog.is_freeing("cpu")
    scene.settle()
    assert not scene.catalog.is_freeing("cpu")
    assert scene.states() == {"leased": "resident", "kept": "resident", "filling": "filling"}


def test_room_of_another_device_is_no_room() -> None:
    scene = Scene((GPU, "cpu"))
    scene.make_resident("s1", "idle")
    scene.end("s1")
    scene.do(e.RoomWanted(GPU, frozenset()))
    assert scene.freed() == []
    assert not scene.catalog.is_freeing(GPU)


def test_an_evicted_component_is_not_found_while_it_is_freed() -> None:
    scene = Scene()
    scene.make_resident("s1", "a")
    scene.end("s1")
    scene.evict("s2", "a")
    assert scene.catalog.is_freeing("cpu")
    assert scene.catalog.use(scene.now, key("a")) is None


def test_ranks_let_go_of_what_a_dead_keeper_left() -> None:
    scene = Scene()
    scene.make_resident("s1", "leased")
    scene.make_resident("s2", "idle")
    scene.end("s2")
    ((leased,), (idle,)) = scene.copies("leased"), scene.copies("idle")
    assert unmapped(scene.do(e.KeeperLost("cpu"))) == [idle.region]
    assert scene.catalog.use(scene.now, key("leased")) is None
    assert unmapped(scene.do(e.SessionEnded("s1"))) == [leased.region]
    assert scene.states() == {}
