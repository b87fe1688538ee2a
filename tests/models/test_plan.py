"""Plans for machines of many sizes: what is recommended, what is counted, what would help."""

from __future__ import annotations

from functools import cache

import flux_files
import pytest
from flux_files import DEV, Flux
from hypothesis import given, settings
from hypothesis import strategies as st
from xdit_sidecar.daemon.gpus import Gpu, Links
from xdit_sidecar.daemon.models import memory, plan_words
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.plan import Plan, Request, make_plan
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.protocol.manifest import TensorSpec

GIB = 1 << 30


@cache
def described(flux: Flux, dtype: str) -> tuple[FluxConfig, list[TensorSpec]]:
    entries = flux_files.entries_of(flux, dtype)
    specs = [TensorSpec(name, dtype, [*shape]) for name, (dtype, shape) in entries.items()]
    return flux_files.detect(entries), specs


def plan(
    *gib: float,
    dtype: str = "BF16",
    flux: Flux = DEV,
    request: Request | None = None,
    links: Links = "unknown",
) -> Plan:
    """For GPUs with so many GiB free."""
    gpus = [Gpu(f"gpu {n}", 200 * GIB, int(free * GIB)) for n, free in enumerate(gib)]
    made = make_plan(*described(flux, dtype), gpus, request or Request(), links)
    for need in made.gpus:
        parts = (need.weights, need.companions, need.activations, need.contexts, need.reserve)
        assert sum(parts) == need.needed == need.free - need.left
        assert min(parts[0], *parts[2:]) > 0
    assert made.fits is all(need.left >= 0 for need in made.gpus)
    assert made.degrees.world_size == len(made.gpus)
    assert not (made.fits and made.options)
    return made


def reason(made: Plan, about: str) -> str:
    (found,) = (text for text in made.reasons if text.startswith(f"{about}: "))
    assert "\n" not in found
    return found


def test_one_large_gpu() -> None:
    made = plan(140)
    assert made.fits
    assert made.model == "FLUX.1 dev or Kontext"
    assert (made.dtype, made.compute) == ("BF16", "BF16")
    assert made.degrees == ParallelConfig()
    (need,) = made.gpus
    # Weights 23.8 GB, T5, CLIP-L and VAE 9.9 GB, decoding 4.6 GB, contexts 1.6 GB, a reserve.
    assert 36e9 < need.needed < 41e9
    assert reason(made, "degrees") == "degrees: one rank computes the whole forward"
    assert not [text for text in made.reasons if text.startswith("links")]


def test_ranks_have_all_weights_and_share_activations() -> None:
    request = Request(2048, 2048)
    one, four = plan(140, request=request), plan(140, 140, 140, 140, request=request)
    assert four.degrees == ParallelConfig(ulysses=4)
    assert "ulysses 4" in reason(four, "degrees")
    assert {need.weights for need in four.gpus} == {one.gpus[0].weights}
    assert {need.companions for need in four.gpus} == {one.gpus[0].companions}
    assert {need.activations for need in four.gpus} == {one.gpus[0].activations // 4}  # of decoding


def test_rows_are_shared_first() -> None:
    made = plan(140, 140, request=Request(batch=2))
    assert made.degrees == ParallelConfig(cfg=2)
    assert "the 2 rows of the batch meet only at the forward's end" in reason(made, "degrees")
    made = plan(*[140] * 10, request=Request(batch=2))
    assert made.degrees == ParallelConfig(ring=5, cfg=2)
    assert "24 heads cannot be shared evenly by all 5 ranks" in reason(made, "degrees")


def test_the_gpu_with_most_room_is_first_and_full_ones_are_left_out() -> None:
    made = plan(3, 60, 40)
    assert made.fits
    assert [need.name for need in made.gpus] == ["gpu 1", "gpu 2"]
    assert "on 2 of 3 GPUs" in reason(made, "degrees")


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ("nvlink", "every pair of GPUs has NVLink"),
        ("peer", "not every pair over NVLink"),
        ("none", "compare with one rank"),
        ("unknown", "not looked at"),
    ],
)
def test_links_are_spoken_about(links: Links, said: str) -> None:
    assert said in reason(plan(140, 140, links=links), "links")


@pytest.mark.parametrize(
    ("dtype", "compute", "said"),
    [
        ("BF16", "BF16", "dtype: bf16 as stored: the weights are used where they lie"),
        ("F16", "F16", "dtype: fp16 as stored"),
        ("F32", "F32", "a bf16 file would be half as large"),
        ("F8_E4M3", "BF16", "dtype: fp8 (e4m3) as stored, computed in bf16"),
        ("F8_E5M2", "BF16", "dtype: fp8 (e5m2) as stored, computed in bf16"),
    ],
)
def test_weights_stay_as_they_are_stored(dtype: str, compute: str, said: str) -> None:
    made = plan(140, dtype=dtype)
    assert (made.dtype, made.compute) == (dtype, compute)
    assert said in reason(made, "dtype")


def test_casting_costs_one_layer() -> None:
    # Large enough for a forward to be more than decoding in tiles.
    request = Request(2048, 2048)
    at_rest, cast = (
        plan(24, request=request, dtype=dtype).gpus[0].activations for dtype in ("F16", "F8_E4M3")
    )
    # A modulation of six times the width.
    assert cast - at_rest == 6 * DEV.width**2 * 2


def test_what_would_help_is_named_with_its_bytes() -> None:
    made = plan(24)
    assert not made.fits
    saves = {option.what: option.saves for option in made.options}
    config, _ = described(DEV, "BF16")
    assert saves[plan_words.OPTION_FP8] == pytest.approx(11.9e9, rel=0.02)
    # The copies of text encoders are given up for what else needs room, and the other way around.
    assert saves[plan_words.OPTION_HOST] == made.gpus[0].activations
    assert saves[plan_words.OPTION_HOST] < memory.text_encoder_bytes(config)
    assert made.options[-1].what == plan_words.OPTION_ALL
    assert made.options[-1].fits
    assert made.options[-1].saves > max(saves[what] for what in saves if "all" not in what)


def test_pictures_are_decoded_in_tiles_where_the_whole_has_no_room() -> None:
    roomy, tight = plan(48), plan(37)
    assert (roomy.tiles, tight.tiles) == (False, True)
    assert roomy.fits
    assert tight.fits
    assert roomy.gpus[0].activations - tight.gpus[0].activations > 3 * GIB
    assert "would take 4.25 GiB at once" in reason(tight, "decoding")
    # A smaller picture saves nothing then, as small as it is decoded anyway.
    assert "smaller" not in str([option.what for option in plan(24).options])
    large = plan(37, request=Request(4096, 4096, batch=8))
    (option,) = (option for option in large.options if "smaller" in option.what)
    assert option.what == "a smaller picture (--size 2048x2048)"
    assert option.saves > 10 * GIB


def test_an_option_that_is_enough_says_so() -> None:
    made = plan(34)
    enough = {option.what for option in made.options if option.fits}
    assert {plan_words.OPTION_FP8, plan_words.OPTION_HOST} <= enough
    assert plan(34, request=Request(encoders_on_gpu=False)).fits
    assert plan(34, dtype="F8_E4M3").fits


def test_text_encoders_in_host_memory_are_copied_for_a_moment() -> None:
    config, _ = described(DEV, "BF16")
    encoders = memory.text_encoder_bytes(config)
    lying, copied = plan(140, 140), plan(140, 140, request=Request(encoders_on_gpu=False))
    for there, here in zip(lying.gpus, copied.gpus, strict=True):
        assert there.companions - here.companions == encoders
        assert here.activations == encoders > there.activations
    assert "a copy of them on its GPU (9.1 GiB" in reason(copied, "VAE and text encoders")
    # What is decoded without tiles needs more room than the copies.
    large = plan(140, request=Request(4096, 4096, encoders_on_gpu=False))
    assert large.gpus[0].activations > encoders


def test_more_gpus_help_where_activations_are_the_problem() -> None:
    request = Request(8192, 8192, encoders_on_gpu=False, batch=4)
    made = plan(40, flux=Flux(24, 128, 1, 1, 64, 32), dtype="F16", request=request)
    (option,) = (option for option in made.options if "such GPUs" in option.what)
    assert option.what.startswith("2 such GPUs")
    assert option.saves > GIB


def test_what_cannot_help_is_not_said() -> None:
    # Already fp8, small, and without text encoders.
    request = Request(256, 256, encoders_on_gpu=False)
    made = plan(10, dtype="F8_E4M3", request=request)
    assert not made.fits
    assert made.options == []


def test_other_text_encoders_are_not_counted() -> None:
    made = plan(4, flux=Flux())
    assert made.gpus[0].companions == 0
    assert "not counted" in reason(made, "VAE and text encoders")


def test_a_plan_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="at least one GPU"):
        plan()


@settings(max_examples=60)
@given(
    gib=st.lists(st.floats(1, 80), min_size=1, max_size=8),
    dtype=st.sampled_from(["BF16", "F8_E4M3", "F32"]),
    side=st.sampled_from([256, 1024, 2048]),
    batch=st.integers(1, 4),
)
def test_plans_of_many_machines(gib: list[float], dtype: str, side: int, batch: int) -> None:
    request = Request(side, side, batch=batch)
    made = plan(*gib, dtype=dtype, request=request)
    if made.fits:
        # Room that is added changes nothing for the worse.
        assert plan(*(2 * free for free in gib), dtype=dtype, request=request).fits
        return
    assert len(made.gpus) == len(gib)
    assert all(option.saves > 0 for option in made.options)
    assert made.options
