"""Several clients at once: each has its turn, and its own numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from flux_inputs import Inputs, comfy_inputs
from ranks_scene import EXACT, SMALL, RanksScene, User, some_inputs, wait_until
from xdit_sidecar.protocol import messages as m


def test_one_client_s_queue_does_not_hold_up_another(scene: RanksScene) -> None:
    many, done = 10, []
    with scene.user(name="busy") as busy, scene.user(name="other") as other:

        def forward(number: int) -> None:
            busy.forward(some_inputs(number))
            done.append(number)

        other.forward(comfy_inputs(SMALL))
        with ThreadPoolExecutor(many) as pool:
            futures = [pool.submit(forward, number) for number in range(many)]
            wait_until(lambda: scene.group.jobs >= many - 2, 20, "the queue is there")
            before = len(done)
            other.forward(comfy_inputs(SMALL))
            # What ran, and one turn of the busy session; a little for threads that are late.
            assert len(done) - before <= 4
            for future in futures:
                future.result()


def test_sessions_of_many_jobs_alternate(scene: RanksScene) -> None:
    each, order = 5, []
    with scene.user(name="a") as a, scene.user(name="b") as b:
        start = threading.Barrier(2 * each)

        def forward(name: str, user: User, seed: int) -> None:
            start.wait()
            user.forward(some_inputs(seed))
            order.append(name)

        with ThreadPoolExecutor(2 * each) as pool:
            futures = [
                pool.submit(forward, name, user, number)
                for number in range(each)
                for name, user in (("a", a), ("b", b))
            ]
            for future in futures:
                future.result()
    half = order[:each]
    assert 1 <= half.count("a") <= each - 1, order


def test_everyone_gets_its_own_numbers(scene: RanksScene) -> None:
    def work(number: int) -> float:
        with scene.user(name=f"worker{number}") as user:
            worst = 0.0
            for turn in range(4):
                inputs = comfy_inputs(SMALL, seed=10 * number + turn, batch=1 + turn % 2)
                found = user.forward(inputs)
                worst = max(worst, (found - expected[number][turn]).abs().max().item())
        return worst

    file = scene.file("small")
    expected = [
        [
            file.alone(comfy_inputs(SMALL, seed=10 * n + turn, batch=1 + turn % 2))
            for turn in range(4)
        ]
        for n in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < EXACT


def picture(user: User, steps: int) -> tuple[m.Generate, Inputs]:
    """A whole picture without a VAE, and what conditions it."""
    inputs = comfy_inputs(SMALL, batch=1)
    job = m.Generate(
        components={"transformer": user.fingerprint},
        tensors=[],
        compute="F32",
        width=128,
        height=128,
        steps=steps,
        decode=False,
    )
    return job, {"context": inputs["context"], "y": inputs["y"]}


def test_forwards_are_done_between_the_steps_of_a_picture(scene: RanksScene) -> None:
    steps: list[int] = []
    between: list[int] = []
    with scene.user(name="painter") as painter, scene.user(name="other") as other:
        job, tensors = picture(painter, 30)

        def paint() -> None:
            found = painter.ranks.run(job, tensors, on_step=lambda step, *_: steps.append(step))
            assert found["latent"].isfinite().all()

        thread = threading.Thread(target=paint)
        thread.start()
        wait_until(lambda: steps, 20, "the first step")
        while len(steps) < 30 and len(between) < 5:
            other.forward(comfy_inputs(SMALL))
            between.append(len(steps))
        thread.join()
    assert steps == list(range(31))
    assert len(between) == 5
    assert between[0] < 30
