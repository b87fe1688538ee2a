"""The estimates are never below what diffusers' forward really allocates, nor far above it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flux_files
import pytest
import torch
from flux_files import DEV, FILL, SCHNELL, Flux
from flux_inputs import comfy_inputs, run_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from xdit_sidecar.daemon.models import memory
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.protocol.manifest import TensorSpec

LOOSEST = 2.5
LATENT = (32, 32)
MEDIUM = Flux(4, 64, 1, 1, 64, 32)


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most that a computation has allocated at a time, of everything that it allocates."""
    compute()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    results: Any = profiler.profiler
    changes = [e.nbytes() for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for change in changes:
        live += change
        highest = max(highest, live)
    assert highest > 0
    return highest


@dataclass(frozen=True)
class Case:
    """One forward of one file."""

    flux: Flux = MEDIUM
    stored: str = "F32"
    compute: torch.dtype = torch.float32
    latent: tuple[int, int] = LATENT
    text: int = 64
    rows: int = 1
    fused: bool = True


BF16 = torch.bfloat16
CASES = {
    "tiny": Case(Flux(), latent=(12, 8), text=7, rows=2),
    "fp32": Case(),
    "fp32, large picture": Case(latent=(64, 64), text=128),
    "bf16": Case(stored="BF16", compute=BF16),
    "bf16, wide": Case(Flux(4, 128, 1, 1, 64, 32), "BF16", BF16, (64, 64), 256),
    "fp16": Case(stored="F16", compute=torch.float16),
    "double blocks, two rows": Case(Flux(4, 64, 3, 0, 64, 32), "BF16", BF16, rows=2),
    "single blocks, two rows": Case(Flux(4, 64, 1, 3, 64, 32), "BF16", BF16, rows=2),
    "fp8, cast at use": Case(stored="F8_E4M3", compute=BF16),
    "fp8, few tokens": Case(Flux(4, 128, 1, 1, 64, 32), "F8_E4M3", BF16, (8, 8), 16),
    "mostly text": Case(latent=(8, 8), text=512),
    "scores written out": Case(text=256, rows=2, fused=False),
    "scores written out, bf16": Case(stored="BF16", compute=BF16, text=256, fused=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_activations_of_a_forward(case: Case) -> None:
    weights = flux_files.store(flux_files.random_weights(case.flux), case.stored)
    config = flux_files.detect({n: (case.stored, tuple(t.shape)) for n, t in weights.items()})
    model = build_flux(config, weights, case.compute).model
    height, width = case.latent
    inputs = comfy_inputs(
        case.flux,
        height=height,
        width=width,
        text=case.text,
        batch=case.rows,
        dtype=case.compute,
    )
    kernel = contextlib.nullcontext() if case.fused else sdpa_kernel(SDPBackend.MATH)
    with kernel:
        measured = peak_bytes(lambda: run_diffusers(model, inputs))
    estimate = memory.forward_bytes(
        config,
        tokens_image=height * width // 4,
        tokens_text=case.text,
        rows=case.rows,
        degrees=ParallelConfig(),
        compute_item_bytes=case.compute.itemsize,
        cast_at_use=case.stored.startswith("F8"),
        fused_attention=case.fused,
    )
    assert measured <= estimate <= LOOSEST * measured, estimate / measured


def estimate(degrees: ParallelConfig, image: int = 4096, text: int = 512, rows: int = 1) -> int:
    return memory.forward_bytes(
        flux_files.detect(flux_files.entries_of(DEV)),
        tokens_image=image,
        tokens_text=text,
        rows=rows,
        degrees=degrees,
        compute_item_bytes=2,
    )


def test_full_size() -> None:
    assert 0.4e9 < estimate(ParallelConfig()) < 0.8e9
    # cfg halves a batch exactly, but for what every rank is given.
    halves = estimate(ParallelConfig(cfg=2), rows=2)
    assert estimate(ParallelConfig()) <= halves < 1.05 * estimate(ParallelConfig())
    # An odd batch over two: each computes two of three.
    assert halves < estimate(ParallelConfig(cfg=2), rows=3) < 2.2 * halves


@settings(max_examples=50)
@given(ulysses=st.sampled_from([1, 2, 3, 4, 6, 8]), image=st.integers(64, 9000))
def test_more_of_anything_never_needs_less(ulysses: int, image: int) -> None:
    one = estimate(ParallelConfig(ulysses=ulysses), image)
    assert one <= estimate(ParallelConfig(ulysses=ulysses), image + 8 * ulysses)
    assert one <= estimate(ParallelConfig(ulysses=ulysses), image, text=800 * ulysses)
    assert one <= estimate(ParallelConfig(ulysses=ulysses), image, rows=2)
    assert one <= estimate(ParallelConfig(ulysses=ulysses, ring=2), 2 * image + 1, text=1024)


def test_ranks_share_the_tokens() -> None:
    alone, eight = estimate(ParallelConfig(), 65536), estimate(ParallelConfig(ulysses=8), 65536)
    assert alone / 8 < eight < alone / 3


def specs(entries: flux_files.Entries, prefix: str = "") -> list[TensorSpec]:
    return [TensorSpec(f"{prefix}{n}", dtype, [*shape]) for n, (dtype, shape) in entries.items()]


@pytest.mark.parametrize("flux", [DEV, SCHNELL, FILL], ids=["dev", "schnell", "fill"])
@pytest.mark.parametrize("prefix", ["", flux_files.PREFIX])
def test_weights_are_the_file_and_what_is_copied(flux: Flux, prefix: str) -> None:
    entries = flux_files.entries_of(flux)
    config = flux_files.detect(entries, prefix)
    other = TensorSpec("first_stage_model.decoder.conv_in.weight", "BF16", [512, 16, 3, 3])
    found = memory.weights_bytes(config, [*specs(entries, prefix), *([other] if prefix else [])])
    swapped = (2 * flux.width * flux.width + 2 * flux.width) * 2
    assert config.nbytes + swapped <= found <= config.nbytes + swapped + (4 << 20)
    assert 23.7e9 < found < 23.9e9


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files_are_foretold(scaled: bool) -> None:
    entries = flux_files.entries_of(DEV, "F8_E4M3", scaled=scaled)
    config = flux_files.detect(entries)
    found = memory.weights_bytes(config, specs(entries))
    assert memory.fp8_bytes(config) == pytest.approx(found, rel=0.005)
    assert memory.fp8_bytes(config) == memory.fp8_bytes(
        flux_files.detect(flux_files.entries_of(DEV))
    )


def test_the_copied_bytes_are_those_of_the_rank() -> None:
    weights = flux_files.store(flux_files.random_weights(MEDIUM), "BF16")
    entries = {name: ("BF16", tuple(tensor.shape)) for name, tensor in weights.items()}
    config = flux_files.detect(entries)
    loaded = build_flux(config, weights, torch.bfloat16)
    found = memory.weights_bytes(config, specs(entries))
    assert (found - loaded.copied_bytes) % (2 << 20) == 0
    assert found >= loaded.copied_bytes + loaded.shared_bytes


def test_text_encoders_are_known_for_published_models_alone() -> None:
    dev = flux_files.detect(flux_files.entries_of(DEV))
    assert 9.7e9 < memory.text_encoder_bytes(dev) < 9.9e9
    assert memory.text_encoder_bytes(flux_files.detect(flux_files.entries_of(Flux()))) == 0


def make_vae() -> torch.nn.Module:
    """FLUX.1's VAE, as diffusers has it."""
    from diffusers import AutoencoderKL

    construct: Any = AutoencoderKL  # untyped
    vae: torch.nn.Module = construct(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.eval()


def test_text_encoders_and_vae_have_these_sizes() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        vae = make_vae()
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )

    def sixteen_bits(*parts: torch.nn.Module) -> int:
        return sum(2 * parameter.numel() for part in parts for parameter in part.parameters())

    dev = flux_files.detect(flux_files.entries_of(DEV))
    assert memory.text_encoder_bytes(dev) == sixteen_bits(t5, clip)
    assert memory.VAE.nbytes == sixteen_bits(vae)
