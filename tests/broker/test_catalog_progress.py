"""What the catalog knows of a fill that is under way, and whom it tells."""

from __future__ import annotations

from catalog_scene import GRANULE, Scene, component, key
from xdit_sidecar.daemon.broker import events as e


def progress(scene: Scene, session: str, region: str, nbytes: int) -> list[e.TellProgress]:
    """Report, see it confirmed, and return what waiters are told."""
    asker = scene.asker(session)
    told = scene.do(e.FillProgressed(asker, region, nbytes))
    assert scene.answer(asker) == e.Confirm(asker)
    return [one for one in told if isinstance(one, e.TellProgress)]


def wait(scene: Scene, session: str, name: str) -> tuple[e.Asker, list[e.TellProgress]]:
    """Hand over what another session fills, asking for progress."""
    asker = scene.asker(session)
    told = scene.do(e.HandOverAsked(asker, key(name), component(name), 1000, progress=True))
    return asker, [one for one in told if isinstance(one, e.TellProgress)]


def filled(scene: Scene, name: str) -> int:
    (copy,) = scene.copies(name)
    return copy.filled


def test_the_fillers_word_is_kept_within_the_region() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    assert filled(scene, "vae") == 0
    progress(scene, "s1", region, 1000)
    assert filled(scene, "vae") == 1000
    progress(scene, "s1", region, 10)
    assert filled(scene, "vae") == 1000, "it never goes back"
    progress(scene, "s1", region, 1 << 41)
    assert filled(scene, "vae") == GRANULE


def test_nobody_else_is_believed() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    wait(scene, "s2", "vae")
    assert not progress(scene, "s2", region, 1000)
    assert not progress(scene, "s1", "0" * 32, 1000)
    assert filled(scene, "vae") == 0
    scene.commit("s1", region)
    assert not progress(scene, "s1", region, 1000), "it is being sealed"
    scene.settle()
    assert not progress(scene, "s1", region, 1000)
    assert filled(scene, "vae") == GRANULE, "resident: all of it is there"


def test_waiters_who_asked_are_told_whole_percents() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiter, told = wait(scene, "s2", "vae")
    assert not told
    scene.hand_over("s3", "vae")  # of an older version: it understands no such answer
    percent = GRANULE // 100 + 1
    assert progress(scene, "s1", region, percent) == [e.TellProgress(waiter, percent, GRANULE)]
    assert not progress(scene, "s1", region, percent + 1)
    late, told = wait(scene, "s4", "vae")
    assert told == [e.TellProgress(late, percent + 1, GRANULE)]
    assert [one.asker for one in progress(scene, "s1", region, GRANULE)] == [waiter, late]
    notes = sum(len(progress(scene, "s1", region, n)) for n in range(0, GRANULE, 4096))
    assert notes == 0


def test_who_gave_up_is_told_nothing() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    waiter, _ = wait(scene, "s2", "vae")
    other, _ = wait(scene, "s3", "vae")
    scene.cancel(waiter)
    assert [one.asker for one in progress(scene, "s1", region, GRANULE // 2)] == [other]
    scene.end("s3")
    assert not progress(scene, "s1", region, GRANULE)


def test_a_new_filler_begins_at_nothing_and_waiters_go_on_listening() -> None:
    scene = Scene()
    region = scene.make_filling("s1", "vae")
    first, _ = wait(scene, "s2", "vae")
    second, _ = wait(scene, "s3", "vae")
    progress(scene, "s1", region, GRANULE // 2)
    scene.end("s1")
    scene.settle()
    grant = scene.answer(first)
    assert isinstance(grant, e.GrantFill)
    assert filled(scene, "vae") == 0
    assert progress(scene, "s2", grant.region, GRANULE // 4) == [
        e.TellProgress(second, GRANULE // 4, GRANULE)
    ]
    scene.commit("s2", grant.region)
    scene.settle()
    assert scene.lease(second)
