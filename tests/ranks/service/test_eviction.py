"""Room is made of what nobody leases, also where ranks have it mapped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import components
import pytest
import torch
from flux_inputs import comfy_inputs
from ranks.service.test_fairness import picture
from ranks_scene import EXACT, SMALL, RanksScene, User, maps, some_inputs, wait_until
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.client import Client
from xdit_sidecar.protocol.errors import InUse, MissingComponent, OutOfMemory, SidecarError

# Of the daemon's 64 MiB; a FLUX.1 takes 4.
ALL, ALL_BUT_ONE = 62 << 20, 58 << 20  # room for nothing else, and for one model beside it


@pytest.fixture
def empty(scene: RanksScene) -> RanksScene:
    """Nothing is resident."""
    evict_all(scene)
    return scene


def evict_all(scene: RanksScene) -> None:
    with scene.daemon.client("evictor") as client:
        scene.daemon.wait_for_status(lambda s: not any(c.sessions for c in s.components))
        for component in client.status().components:
            client.evict(component.fingerprint, "cpu")
    assert not scene.status.components


def used_once(scene: RanksScene, name: str, seed: int) -> User:
    """Somebody who computed with a component and left; it stays mapped in the ranks."""
    with scene.user(scene.file(name, seed=seed), name) as user:
        user.forward(comfy_inputs(SMALL))
    scene.daemon.wait_for_status(
        lambda s: not any(c.sessions for c in s.components if c.fingerprint == user.fingerprint)
    )
    return user


def take(client: Client, nbytes: int) -> Attachment:
    """A component that is as large."""
    tensors = {"weight": torch.zeros(nbytes, dtype=torch.uint8)}
    component = components.describe(tensors, f"of {nbytes} bytes")
    return client.hand_over(component, "cpu", lambda writer: None, timeout=60)


@pytest.fixture
def taker(scene: RanksScene) -> Iterator[Client]:
    with scene.daemon.client("taker") as client:
        yield client


def test_the_ranks_let_go_of_what_is_evicted(empty: RanksScene, taker: Client) -> None:
    used = used_once(empty, "victim", 7)
    assert [maps(pid) for pid in empty.rank_pids] == [1, 1]
    take(taker, ALL).release()
    (left,) = empty.status.components
    assert left.fingerprint != used.fingerprint
    assert [maps(pid) for pid in empty.rank_pids] == [0, 0]
    (device,) = empty.status.devices
    assert device.regions == left.nbytes


def test_a_job_on_what_was_evicted_says_what_to_do(empty: RanksScene, taker: Client) -> None:
    gone = used_once(empty, "victim", 7)
    taker.evict(gone.fingerprint, "cpu")
    with empty.user(empty.file("small")) as user:
        for _ in range(2):
            with pytest.raises(MissingComponent, match="hand it over"):
                user.forward(comfy_inputs(SMALL), job=gone.job())
    with empty.user(empty.file("victim")) as user:  # into another region
        inputs = comfy_inputs(SMALL)
        expected = empty.file("victim").alone(inputs)
        assert (user.forward(inputs) - expected).abs().max() < EXACT


def test_what_is_leased_stays(empty: RanksScene, taker: Client) -> None:
    with empty.user() as user:
        user.forward(comfy_inputs(SMALL))
        with pytest.raises(InUse):
            taker.evict(user.fingerprint, "cpu")
        used_once(empty, "victim", 7)
        take(taker, ALL_BUT_ONE).release()
        assert user.forward(comfy_inputs(SMALL)).isfinite().all()
        assert [maps(pid) for pid in empty.rank_pids] == [1, 1]


def test_room_waits_for_a_forward_that_runs(empty: RanksScene, taker: Client) -> None:
    used_once(empty, "victim", 7)
    times: dict[str, float] = {}
    with empty.user() as user:
        user.forward(comfy_inputs(SMALL))

        def forward() -> None:
            user.forward(some_inputs(batch=3))
            times["forward"] = time.monotonic()

        thread = threading.Thread(target=forward)
        thread.start()
        wait_until(lambda: empty.group.jobs, 10, "the forward runs")
        take(taker, ALL_BUT_ONE).release()
        times["room"] = time.monotonic()
        thread.join()
        assert user.forward(comfy_inputs(SMALL)).isfinite().all()
    assert times["room"] > times["forward"] - 0.05
    assert [maps(pid) for pid in empty.rank_pids] == [1, 1]


def test_a_picture_whose_model_is_evicted(empty: RanksScene, taker: Client) -> None:
    with empty.user(empty.file("victim", seed=7)) as user:
        job, tensors = picture(user, 200)
        evicted: list[int] = []

        def evict(step: int, steps: int, preview: object) -> None:
            if step == 3:
                user.held.release()
            if step >= 3 and not evicted:
                try:
                    taker.evict(user.fingerprint, "cpu")
                except InUse:
                    return
                evicted.append(step)

        with pytest.raises(MissingComponent, match="while it ran"):
            user.ranks.run(job, tensors, on_step=evict)
        assert evicted
    assert [maps(pid) for pid in empty.rank_pids] == [0, 0]


def test_an_unleased_model_that_jobs_use_is_not_the_oldest(
    empty: RanksScene, taker: Client
) -> None:
    old = used_once(empty, "old", 8)
    young = used_once(empty, "victim", 7)
    with empty.user(empty.file("small")) as user:
        user.forward(comfy_inputs(SMALL), job=old.job())  # nobody leases it
        take(taker, 54 << 20).release()
    left = {component.fingerprint for component in empty.status.components}
    assert old.fingerprint in left
    assert young.fingerprint not in left


def test_evictions_and_forwards_at_once(empty: RanksScene) -> None:
    """Whoever comes second is told so; nobody hangs, no rank is restarted."""
    stop = threading.Event()
    told: list[SidecarError] = []

    def evict() -> None:
        with empty.daemon.client("evictor") as client:
            while not stop.is_set():
                with contextlib.suppress(OutOfMemory):  # right now somebody leases it
                    take(client, ALL).release()
                time.sleep(0.01)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        for number in range(15):
            inputs = comfy_inputs(SMALL, seed=number % 3)
            expected = empty.file("victim", seed=7).alone(inputs)
            try:
                with empty.user(empty.file("victim")) as user:
                    user.held.release()  # from here on it may go
                    assert (user.forward(inputs) - expected).abs().max() < EXACT
            except (MissingComponent, OutOfMemory) as error:
                told.append(error)
    finally:
        stop.set()
        thread.join()
    assert len(told) < 15
