"""Whole pictures by two ranks, from token ids or conditioning, against one process alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flux_inputs import Inputs
from picture_scene import (
    EXACT,
    HEIGHT,
    STEPS,
    TINY,
    WIDTH,
    Drawer,
    PipelineFiles,
    drawing,
    ids_of,
    negative,
    noise_of,
)
from ranks_scene import RanksScene, some_inputs
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.daemon.ranks.sampling.samplers import SAMPLERS
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import Cancelled


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PipelineFiles:
    return TINY.write(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def drawer(scene: RanksScene, files: PipelineFiles) -> Iterator[Drawer]:
    """A client with every part of a tiny pipeline resident."""
    with scene.daemon.client("drawer") as client, drawing(client, files) as made:
        yield made


@pytest.fixture(scope="module")
def prompt(files: PipelineFiles) -> Inputs:
    """The conditioning of ``ids_of()``."""
    return files.encode_text(ids_of())


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_token_ids_to_picture(drawer: Drawer, files: PipelineFiles, prompt: Inputs) -> None:
    seen = []
    found = drawer.draw(ids_of(), seed=7, on_step=lambda *step: seen.append(step))
    assert seen == [(step, STEPS, None) for step in range(STEPS + 1)]
    assert found.keys() == {"latent", "image"}
    expected = files.draw(prompt, noise_of(7))
    assert_close(found["latent"], expected)
    assert found["image"].shape == (1, HEIGHT, WIDTH, 3)
    assert found["image"].dtype == torch.float32
    assert_close(found["image"], files.vae.decode(expected))


def test_ready_conditioning_equals_token_ids(drawer: Drawer, prompt: Inputs) -> None:
    by_ids = drawer.draw(ids_of(), seed=7)
    # Neither text encoder is needed; the second time the prompt is named by its digest.
    for _ in range(2):
        ready = drawer.draw(prompt, "clip_l", "t5", seed=7)
        assert_close(ready["image"], by_ids["image"])


def test_longer_clip_prompts_count_by_their_first_window(drawer: Drawer) -> None:
    ids = ids_of()
    more = torch.randint(0, 1000, (1, 77), generator=torch.Generator().manual_seed(3))
    long = {**ids, "clip_l_ids": torch.cat([ids["clip_l_ids"], more], 1)}
    job = {"decode": False, "steps": 1}
    assert torch.equal(drawer.draw(long, **job)["latent"], drawer.draw(ids, **job)["latent"])


def test_given_latent_noise_and_sigmas(
    drawer: Drawer, files: PipelineFiles, prompt: Inputs
) -> None:
    # Odd sides, another size than the job's, and a run that ends with noise in it.
    noise, latent = (seeded_noise((1, 16, 10, 6), seed) for seed in (1, 2))
    sigmas = torch.tensor([0.8, 0.5, 0.3])
    given = {"latent": 2 * latent, "noise": noise, "sigmas": sigmas}
    found = drawer.draw({**prompt, **given}, decode=False, steps=20)["latent"]
    assert_close(found, files.draw(prompt, noise, latent=2 * latent, sigmas=sigmas))


def test_odd_latents_have_their_size(drawer: Drawer, prompt: Inputs) -> None:
    found = drawer.draw({**prompt, "noise": seeded_noise((1, 16, 7, 5), 1)}, steps=1)
    assert found["latent"].shape == (1, 16, 7, 5)
    assert found["image"].shape == (1, 56, 40, 3)


def test_schedules_and_denoise(drawer: Drawer, files: PipelineFiles, prompt: Inputs) -> None:
    latent = 2 * noise_of(3)
    for scheduler in ("simple", "normal", "sgm_uniform"):
        settings = {"denoise": 0.6, "scheduler": scheduler}
        found = drawer.draw({**prompt, "latent": latent}, seed=5, decode=False, **settings)
        expected = files.draw(prompt, noise_of(5), latent=latent, sigmas=files.sigmas(**settings))
        assert_close(found["latent"], expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_with_mask(
    drawer: Drawer, files: PipelineFiles, prompt: Inputs, sampler: str
) -> None:
    latent, mask = 2 * noise_of(3), torch.zeros(HEIGHT, WIDTH)
    mask[: HEIGHT // 2] = 1
    given = {"latent": latent, "mask": mask}
    found = drawer.draw({**prompt, **given}, seed=5, sampler=sampler, decode=False)["latent"]
    other = {"mask_noise": noise_of(6)} if sampler == "ddim" else {}
    assert_close(found, files.draw(prompt, noise_of(5), sampler=sampler, **given, **other))
    half = HEIGHT // 16
    torch.testing.assert_close(found[:, :, half + 1 :], latent[:, :, half + 1 :])


@pytest.mark.parametrize("length", [9, 14], ids=["equal lengths", "different lengths"])
def test_negative_prompts(
    drawer: Drawer, files: PipelineFiles, prompt: Inputs, length: int
) -> None:
    other = ids_of(1, length=length)
    found = drawer.draw({**ids_of(), **negative(other)}, cfg=2.5, seed=5, decode=False)["latent"]
    without = files.encode_text(other)
    expected = files.draw(prompt, noise_of(5), negative=without, cfg=2.5)
    assert_close(found, expected)
    # Ready conditioning, and with cfg 1 nobody asks for it.
    ready = {**prompt, **negative(without)}
    assert_close(drawer.draw(ready, cfg=2.5, seed=5, decode=False)["latent"], expected)
    plain = drawer.draw(ready, cfg=1.0, seed=5, decode=False)["latent"]
    assert_close(plain, files.draw(prompt, noise_of(5)))


def test_batches(drawer: Drawer, files: PipelineFiles, prompt: Inputs) -> None:
    found = drawer.draw(ids_of(), batch=2, seed=5)
    expected = files.draw(prompt, noise_of(5, batch=2))
    assert_close(found["latent"], expected)
    assert_close(found["image"], files.vae.decode(expected))
    # A prompt for each.
    two = ids_of(4, rows=2)
    found = drawer.draw(two, batch=2, seed=5, decode=False)
    assert_close(found["latent"], files.draw(files.encode_text(two), noise_of(5, batch=2)))


def test_models_without_guidance(scene: RanksScene, files: PipelineFiles, prompt: Inputs) -> None:
    schnell = TINY.schnell.write(files.paths["vae"].parent, "schnell")
    with scene.daemon.client("schnell") as client, drawing(client, schnell) as other:
        found = other.draw(ids_of(), seed=5, decode=False)["latent"]
        assert_close(found, schnell.draw(prompt, noise_of(5)))


def test_previews(drawer: Drawer, prompt: Inputs) -> None:
    seen: list[tuple[int, int, torch.Tensor | None]] = []
    found = drawer.draw(prompt, seed=7, preview=True, on_step=lambda *step: seen.append(step))
    assert seen[0] == (0, STEPS, None)
    for _, _, preview in seen[1:]:
        assert preview is not None
        assert preview.dtype == torch.uint8
        assert preview.shape == (HEIGHT // 8, WIDTH // 8, 3)
    # The last one is of the finished picture, as well as 3 colours of 8 by 8 pixels can be.
    small = torch.nn.functional.avg_pool2d(found["image"].movedim(3, 1), 8)[0].movedim(0, 2)
    last = seen[-1][2]
    assert last is not None
    similar = torch.corrcoef(torch.stack([small.flatten(), last.float().flatten()]))[0, 1]
    assert similar > 0.3


def test_cancelling_in_the_middle(drawer: Drawer, scene: RanksScene, prompt: Inputs) -> None:
    expected = drawer.draw(prompt, seed=7)["image"]
    seen: list[int] = []
    with pytest.raises(Cancelled):
        drawer.draw(
            prompt,
            steps=5000,
            on_step=lambda step, *_: seen.append(step),
            should_cancel=lambda: len(seen) > 2,
        )
    assert len(seen) < 20
    scene.wait_until_idle()
    assert torch.equal(drawer.draw(prompt, seed=7)["image"], expected)


def test_two_clients_draw_at_once(drawer: Drawer, scene: RanksScene, files: PipelineFiles) -> None:
    prompts = [ids_of(number) for number in range(2)]
    alone = [drawer.draw(ids, seed=n, steps=6)["image"] for n, ids in enumerate(prompts)]
    steps: list[int] = []
    both_begun = threading.Barrier(2, timeout=30)

    def draw(number: int, who: Drawer) -> torch.Tensor:
        def on_step(step: int, *_: object) -> None:
            steps.append(number)
            if not step:
                both_begun.wait()

        settings = {"seed": number, "steps": 6, "on_step": on_step}
        return who.draw(prompts[number], **settings)["image"]

    with (
        scene.daemon.client("second") as client,
        drawing(client, files) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        pictures = list(pool.map(draw, range(2), (drawer, second)))
    for picture, expected in zip(pictures, alone, strict=True):
        assert torch.equal(picture, expected)
    assert len(steps) == 14


def test_forwards_are_served_between_steps(drawer: Drawer, scene: RanksScene) -> None:
    with scene.user(name="forwarder") as user:
        inputs = some_inputs()
        expected = user.forward(inputs)
        alone = drawer.draw(ids_of(), seed=7, steps=30)["latent"]
        done: list[int] = []
        begun = threading.Event()

        def on_step(step: int, *_: object) -> None:
            done.append(step)
            begun.set()

        with ThreadPoolExecutor(1) as pool:
            picture = pool.submit(drawer.draw, ids_of(), seed=7, steps=30, on_step=on_step)
            assert begun.wait(30)
            between = []
            for _ in range(3):
                assert torch.equal(user.forward(inputs), expected)
                between.append(len(done))
            assert torch.equal(picture.result()["latent"], alone)
        assert between[-1] < 30, "the forwards waited for the whole picture"


def test_the_same_weights_in_another_compute_dtype(drawer: Drawer, prompt: Inputs) -> None:
    # Views of the same weights, computed in bf16: near, and not the same.
    exact = drawer.draw(prompt, seed=7)["image"]
    rough = drawer.draw(prompt, seed=7, compute="BF16")["image"]
    assert 0 < (exact - rough).abs().mean() < 0.05
    assert torch.equal(drawer.draw(prompt, seed=7)["image"], exact)


def test_pipefusion_keeps_apart_what_is_denoised_in_turns(drawer: Drawer, prompt: Inputs) -> None:
    # Without "y" it is all zeros, and both prompts are not computed as one batch.
    other = {"context": 2 * prompt["context"].flip(1)}
    settings = {"cfg": 2.5, "steps": 6, "seed": 5, "decode": False}
    degrees = m.Degrees(pipefusion=2)
    inputs = {**prompt, **negative(other)}
    apart = drawer.draw(inputs, degrees=degrees, **settings)["latent"]
    zeros = {"negative_y": torch.zeros_like(prompt["y"])}
    together = drawer.draw({**inputs, **zeros}, degrees=degrees, **settings)["latent"]
    exact = drawer.draw({**inputs, **zeros}, **settings)["latent"]
    assert_close(apart, together)
    assert 0.0 < (together - exact).abs().max() < 1.0
