"""The denoising loop by itself: what it asks, keeps and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from xdit_sidecar.daemon.ranks.sampling.latent_format import to_model, to_vae
from xdit_sidecar.daemon.ranks.sampling.mask import fit_mask
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.daemon.ranks.sampling.sampler import Denoising
from xdit_sidecar.daemon.ranks.sampling.samplers import SAMPLERS
from xdit_sidecar.daemon.ranks.sampling.schedule import flux_sigmas

SHAPE = (2, 4, 6, 5)
NOISE = seeded_noise(SHAPE, 1)
SIGMAS = flux_sigmas(4)
TARGET = seeded_noise(SHAPE, 2)


def towards_target(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity of a model that knows what comes out."""
    return (latent - TARGET) / sigma.view(-1, 1, 1, 1)


def finish(denoising: Denoising, model: Any = towards_target) -> torch.Tensor:
    while not denoising.done:
        denoising.step(model)
    return denoising.result()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_knows_the_picture_gives_it(sampler: str) -> None:
    result = finish(Denoising.start(NOISE, SIGMAS, sampler=sampler))
    assert torch.allclose(result, to_vae(TARGET), atol=1e-5)


def test_each_step_is_seen() -> None:
    denoising = Denoising.start(NOISE, SIGMAS)
    assert torch.equal(denoising.latent, NOISE)
    assert denoising.denoised is None
    asked = []

    def model(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(sigma)
        return towards_target(latent, sigma)

    for index in range(4):
        assert (denoising.index, denoising.steps, denoising.done) == (index, 4, False)
        denoising.step(model)
        assert torch.allclose(denoising.denoised, TARGET, atol=1e-5)
    assert denoising.done
    assert torch.equal(torch.stack(asked), SIGMAS[:4, None].expand(4, 2))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_a_failed_step_can_be_repeated(sampler: str) -> None:
    denoising = Denoising.start(NOISE, SIGMAS, sampler=sampler)
    calls = 0

    def failing(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise OSError("a rank was lost")
        return towards_target(latent, sigma) * sigma.mean()

    failures = 0
    while not denoising.done:
        try:
            denoising.step(failing)
        except OSError:
            failures += 1
    assert failures == 2
    calls = 10
    expected = finish(Denoising.start(NOISE, SIGMAS, sampler=sampler), failing)
    assert torch.equal(denoising.result(), expected)


def test_without_cfg_the_second_velocity_is_not_needed() -> None:
    plain = Denoising.start(NOISE, SIGMAS)
    assert not plain.needs_unconditional
    assert Denoising.start(NOISE, SIGMAS, cfg=0.0).needs_unconditional

    def both(latent: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return towards_target(latent, sigma), torch.full_like(latent, torch.nan)

    assert torch.equal(finish(plain, both), finish(Denoising.start(NOISE, SIGMAS)))


def test_what_the_mask_leaves_out_is_kept_exactly_in_the_end() -> None:
    latent = seeded_noise(SHAPE, 3)
    mask = torch.zeros(6, 5)
    mask[:3] = 1
    result = finish(Denoising.start(NOISE, SIGMAS, latent=latent, mask=mask))
    assert torch.allclose(result[:, :, 3:], latent[:, :, 3:], atol=1e-5)
    assert torch.allclose(result[:, :, :3], to_vae(TARGET)[:, :, :3], atol=1e-5)


def test_velocities_of_any_dtype_leave_the_latent_in_fp32() -> None:
    denoising = Denoising.start(NOISE.double(), SIGMAS)
    denoising.step(lambda latent, sigma: towards_target(latent, sigma).bfloat16())
    assert denoising.latent.dtype == torch.float32


def test_givens_are_not_written_to() -> None:
    givens = [NOISE, SIGMAS, TARGET, torch.rand(6, 5)]
    before = [tensor.clone() for tensor in givens]
    for sampler in SAMPLERS:
        finish(
            Denoising.start(NOISE, SIGMAS, latent=TARGET, mask=givens[3], cfg=1.0, sampler=sampler)
        )
    assert all(torch.equal(one, other) for one, other in zip(givens, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "lms"}, "sampler 'lms' is unknown; use one of: euler, "),
        ({"cfg": float("inf")}, "cfg=inf"),
        ({"noise": torch.zeros(4, 6, 5)}, r"noise of shape \(4, 6, 5\)"),
        ({"latent": torch.zeros(1, 4, 6, 5)}, r"latent has shape \(1, 4, 6, 5\), noise has"),
        ({"mask": torch.zeros(5)}, r"a noise mask of shape \(5,\)"),
        ({"mask": torch.zeros(2, 3, 6, 5)}, "a noise mask of shape"),
        ({"mask": torch.ones(6, 5), "mask_noise": torch.zeros(2, 4, 6, 6)}, "mask_noise has"),
        ({"sigmas": torch.tensor([1.0])}, r"sigmas of shape \(1,\) \(1 …\) cannot"),
        ({"sigmas": torch.tensor([0.5, 0.5, 0.0])}, "use two or more that fall"),
        ({"sigmas": torch.tensor([0.5, -0.1])}, "fall from at most 1 to 0"),
        ({"sigmas": torch.tensor([14.6, 0.0])}, "at most 1"),
        ({"sigmas": torch.tensor([1.0, float("nan")])}, "fall"),
        ({"sigmas": torch.ones(2, 2)}, "cannot be gone through"),
        ({"sigmas": flux_sigmas(4, denoise=0.0)}, r"sigmas of shape \(0,\)"),
    ],
)
def test_impossible_runs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising.start(**{"noise": NOISE, "sigmas": SIGMAS, **changes})


def test_wrong_answers_are_refused() -> None:
    denoising = Denoising.start(NOISE, SIGMAS, cfg=2.0)
    with pytest.raises(ValueError, match=r"cfg=2\.0 needs the velocity without the prompt"):
        denoising.step(towards_target)
    with pytest.raises(ValueError, match=r"velocity has shape \(1, 4, 6, 5\), the latent has"):
        denoising.step(lambda latent, sigma: (latent, latent[:1]))
    assert denoising.index == 0


def test_the_order_of_calls_is_kept() -> None:
    denoising = Denoising.start(NOISE, SIGMAS)
    with pytest.raises(RuntimeError, match="0 of 4 steps are done"):
        denoising.result()
    finish(denoising)
    with pytest.raises(RuntimeError, match="all 4 steps are done"):
        denoising.step(towards_target)


def test_latent_format_goes_both_ways() -> None:
    assert torch.allclose(to_vae(to_model(NOISE)), NOISE, atol=1e-6)


def test_masks_are_repeated_and_cut() -> None:
    rows = torch.tensor([0.25, 0.75]).view(2, 1, 1).expand(2, 3, 3)
    fitted = fit_mask(rows, torch.Size((5, 4, 6, 5)))
    assert fitted.shape == (5, 4, 6, 5)
    assert fitted[:, 0, 0, 0].tolist() == [0.25, 0.75, 0.25, 0.75, 0.25]
    assert fit_mask(rows > 0.5, torch.Size((1, 4, 6, 5))).max() == 0


# --- noise


def test_noise_is_that_of_the_global_generator_which_is_left_alone() -> None:
    for shape in (SHAPE, (1, 1, 1, 3), (1, 16, 33, 17)):
        torch.manual_seed(77)
        state = torch.get_rng_state()
        noise = seeded_noise(shape, 123)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(123)
        assert torch.equal(noise, torch.randn(shape))


def test_noise_of_other_dtypes() -> None:
    torch.manual_seed(5)
    assert torch.equal(
        seeded_noise(SHAPE, 5, dtype=torch.float16), torch.randn(SHAPE, dtype=torch.float16)
    )


@pytest.mark.parametrize(
    ("seed", "indices", "message"),
    [
        (2**64, None, "seed 18446744073709551616 is out of range"),
        (-(2**63) - 1, None, "out of range"),
        (1, (0,), "1 batch indices for 2 latents"),
        (1, (0, -1), "batch indices -1 to 0"),
        (1, (0, 1 << 40), "use 0 to 4095"),
    ],
)
def test_impossible_noise_is_refused(
    seed: int, indices: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        seeded_noise(SHAPE, seed, batch_index=indices)


# --- schedule


def test_known_schedules() -> None:
    expected = torch.tensor([1.0, 0.9045, 0.7595, 0.5128, 0.0])
    assert torch.allclose(flux_sigmas(4), expected, atol=1e-4)
    assert torch.allclose(flux_sigmas(4, shift=1.0), torch.linspace(1, 0, 5))
    assert len(flux_sigmas(10, denoise=0.6)) == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0: use a whole number"),
        ({"steps": 10_001}, "from 1 to 10000"),
        ({"steps": True}, "steps=True"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"scheduler": "karras"}, "'karras' is unknown; use one of: simple, normal"),
        ({"mu": 1.0, "shift": 1.0}, "give one of them"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"mu": 81.0}, "from -80 to 80"),
        ({"shift": 0.0}, r"shift=0\.0"),
        ({"denoise": float("nan")}, "denoise=nan"),
        ({"denoise": 1e-6}, "would have 4000000 steps"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flux_sigmas(**{"steps": 4, **changes})
