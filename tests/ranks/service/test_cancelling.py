"""Giving up: the client is free at once, the ranks stay in step."""

from __future__ import annotations

import threading
import time
from random import Random

import pytest
import torch
from flux_inputs import comfy_inputs
from ranks.service.test_fairness import picture
from ranks_scene import SMALL, RanksScene, User, some_inputs, wait_until
from xdit_sidecar.protocol.errors import Cancelled, DaemonLost, DeadlineExceeded

FREE_SECONDS = 1.0  # "at once", on a busy machine


class After:
    """``should_cancel`` that says so from a moment on."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def __call__(self) -> bool:
        return time.monotonic() >= self.at


def cancel_at_random(scene: RanksScene, count: int, seed: int = 0) -> int:
    """So many forwards given up at random moments; how many of them ended before that.

    AssertionError for a wrong number, a client that is not released, a restart, or work left over.
    """
    random, finished, starts = Random(seed), 0, scene.starts
    inputs = some_inputs()
    with scene.user(name="hasty") as user:
        expected = user.forward(inputs)
        began = time.monotonic()
        user.forward(inputs)
        usual = time.monotonic() - began
        for number in range(count):
            after = After(random.uniform(0, 1.5 * usual))
            try:
                found = user.forward(inputs, should_cancel=after, timeout=60)
            except Cancelled:
                assert time.monotonic() - after.at < FREE_SECONDS
            else:
                finished += 1
                assert torch.equal(found, expected)
            if not number % 10:
                assert torch.equal(user.forward(inputs), expected)
        assert torch.equal(user.forward(inputs), expected)
    scene.wait_until_idle()
    assert scene.starts == starts
    return finished


def test_forwards_at_random_moments(scene: RanksScene) -> None:
    assert cancel_at_random(scene, 50) < 50


def test_pictures_at_random_moments(scene: RanksScene) -> None:
    random = Random(1)
    with scene.user() as user:
        job, tensors = picture(user, 12)
        expected = user.ranks.run(job, tensors)["latent"]
        for _ in range(8):
            stop = random.randint(0, 12)
            seen: list[int] = []

            def should_cancel(seen: list[int] = seen, stop: int = stop) -> bool:
                return bool(seen) and seen[-1] >= stop

            try:
                user.ranks.run(
                    job,
                    tensors,
                    should_cancel=should_cancel,
                    on_step=lambda step, *_, seen=seen: seen.append(step),
                )
            except Cancelled:
                assert seen[-1] >= stop
        assert torch.equal(user.ranks.run(job, tensors)["latent"], expected)
    scene.wait_until_idle()


def test_what_waits_is_never_begun(scene: RanksScene, user: User) -> None:
    busy = threading.Thread(target=lambda: user.forward(some_inputs(2, batch=3)))
    with scene.user(name="impatient") as impatient:
        busy.start()
        wait_until(lambda: scene.group.jobs, 10, "the forward runs")
        with pytest.raises(Cancelled):
            impatient.forward(some_inputs(), should_cancel=After(0.0))
        with pytest.raises(DeadlineExceeded):
            impatient.forward(some_inputs(), timeout=0.01)
        busy.join()
        assert impatient.forward(comfy_inputs(SMALL)).isfinite().all()


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "picture"])
def test_a_client_that_goes_while_its_job_runs(scene: RanksScene, whole: bool) -> None:
    kept = scene.group.kept_tensors
    for pause in (0.0, 0.02, 0.05):
        with scene.user(name="leaver") as user:
            job, tensors = picture(user, 1000) if whole else (user.job(), some_inputs(3, batch=3))
            ended: list[BaseException] = []

            def work(user=user, job=job, tensors=tensors, ended=ended) -> None:  # type: ignore[no-untyped-def]
                try:
                    user.ranks.run(job, tensors)
                except DaemonLost as error:
                    ended.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            wait_until(lambda: scene.group.jobs, 10, "the job is there")
            time.sleep(pause)
            # Not close(), which waits for calls that are open: as if the process had died.
            session = user.client._session
            assert session is not None
            session.close()
            thread.join(10)
            assert not thread.is_alive()
            assert ended
        scene.wait_until_idle()
        scene.daemon.wait_for_status(lambda s: s.group.kept_tensors == kept)
    with scene.user() as after:
        assert after.forward(comfy_inputs(SMALL)).isfinite().all()
