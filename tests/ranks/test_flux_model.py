"""FLUX.1 files as diffusers models: the same numbers, the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flux_files
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from flux_files import DEV, FILL, PREFIX, SCHNELL, Flux
from flux_inputs import comfy_inputs, run_diffusers
from torch import nn
from xdit_sidecar.daemon.models.flux_detection import detect_flux_file
from xdit_sidecar.daemon.ranks.flux import model as flux_model
from xdit_sidecar.daemon.ranks.flux.casting import CastLinear, CastRMSNorm
from xdit_sidecar.daemon.ranks.flux.exact_times import keep_times_exact
from xdit_sidecar.daemon.ranks.flux.model import LoadedFlux, build_flux
from xdit_sidecar.daemon.ranks.flux.weights import map_weights
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

Weights = Mapping[str, torch.Tensor]

# What diffusers' converter takes every FLUX.1 to be.
CONVERTER_WIDTH = 3072

MODELS = {
    "dev": Flux(),
    "schnell": Flux(guidance=False),
    "fill": Flux(inputs=288),
    "depth": Flux(inputs=32),
    "one head of 128": Flux(heads=1, head_size=128, double=1, single=1),
    "three heads of 24": Flux(heads=3, head_size=24, double=3, single=1, pooled=5),
}


def load(
    path: Path, weights: Weights, compute: torch.dtype = torch.float32, prefix: str = ""
) -> tuple[LoadedFlux, torch.UntypedStorage]:
    """The weights through a file, whose map is where the shared bytes are."""
    flux_files.write(path, weights, prefix)
    return load_file(path, compute)


def load_file(path: Path, compute: torch.dtype) -> tuple[LoadedFlux, torch.UntypedStorage]:
    with SafetensorsFile.open(path) as file:
        config = detect_flux_file(file)
    tensors, whole = flux_files.map_file(path, config.prefix)
    return build_flux(config, tensors, compute), whole


def converted(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights by diffusers' own converter, which copies and knows only one width.

    So the parts of each linear1 are moved to where it expects them, and cut out again.
    """
    given = {name: tensor.clone() for name, tensor in weights.items()}
    width = given["img_in.bias"].shape[0]
    ratios = (1, 1, 1, 4)
    for name, tensor in given.items():
        if ".linear1." in name:
            parts = tensor.split([ratio * width for ratio in ratios])
            wide = [
                nn.functional.pad(
                    part, (*(0, 0) * (part.ndim - 1), 0, ratio * CONVERTER_WIDTH - len(part))
                )
                for ratio, part in zip(ratios, parts, strict=True)
            ]
            given[name] = torch.cat(wide)
    found: dict[str, torch.Tensor] = convert_flux_transformer_checkpoint_to_diffusers(given)
    for name, tensor in found.items():
        if name.startswith("single_transformer_blocks.") and ".norm" not in name:
            if ".proj_mlp." in name:
                found[name] = tensor[: 4 * width]
            elif ".attn.to_" in name:
                found[name] = tensor[:width]
    return found


def reference(flux: Flux, weights: Weights) -> nn.Module:
    """A diffusers model made in the ordinary way, with copies of the weights in fp32."""
    arguments: dict[str, Any] = {
        "in_channels": flux.inputs,
        "out_channels": flux.channels,
        "num_layers": flux.double,
        "num_single_layers": flux.single,
        "attention_head_dim": flux.head_size,
        "num_attention_heads": flux.heads,
        "joint_attention_dim": flux.context,
        "pooled_projection_dim": flux.pooled,
        "guidance_embeds": flux.guidance,
        "axes_dims_rope": {16: (4, 6, 6), 24: (4, 10, 10), 128: (16, 56, 56)}[flux.head_size],
    }
    model: nn.Module = FluxTransformer2DModel(**arguments).eval()
    model.load_state_dict(converted(weights), strict=True)
    return model


def is_inside(tensor: torch.Tensor, whole: torch.UntypedStorage) -> bool:
    start = tensor.data_ptr() - whole.data_ptr()
    return start >= 0 and start + tensor.nbytes <= whole.nbytes()


def assert_shared(loaded: LoadedFlux, whole: torch.UntypedStorage) -> None:
    """Every parameter and scale lies in the file's map, but the last modulation."""
    outside = {
        name
        for name, tensor in (*loaded.model.named_parameters(), *loaded.model.named_buffers())
        if not is_inside(tensor, whole)
    }
    assert outside == {"norm_out.linear.weight", "norm_out.linear.bias"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["alone", "checkpoint"])
def test_output_equals_diffusers(tmp_path: Path, name: str, prefix: str) -> None:
    flux = MODELS[name]
    weights = flux_files.random_weights(flux)
    loaded, whole = load(tmp_path / "flux.safetensors", weights, prefix=prefix)
    inputs = comfy_inputs(flux)
    expected = run_diffusers(reference(flux, weights), inputs)
    output = run_diffusers(loaded.model, inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    assert_shared(loaded, whole)
    assert loaded.cast_layers == 0
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_whole_map_equals_diffusers_converter() -> None:
    # Real depth and width, but narrow: the converter cuts along rows only.
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn((shape[0], 2) if len(shape) == 2 else shape, generator=generator)
        for name, shape in flux_files.shapes_of(DEV).items()
    }
    with_sizes = flux_files.entries_of(DEV)
    config = flux_files.detect(with_sizes)
    mapped = map_weights(config, weights)
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(weights))
    assert mapped.state.keys() == expected.keys()
    assert len(expected) == 1160
    different = [name for name in expected if not torch.equal(mapped.state[name], expected[name])]
    assert not different


@pytest.mark.parametrize(
    ("flux", "dtype", "scaled"),
    [
        (DEV, "BF16", False),
        (DEV, "F8_E4M3", True),
        (DEV, "F8_E4M3", False),
        (SCHNELL, "F16", False),
        (FILL, "BF16", False),
    ],
    ids=["dev", "dev-scaled-fp8", "dev-fp8", "schnell-fp16", "fill"],
)
def test_full_size_files_are_shared(tmp_path: Path, flux: Flux, dtype: str, scaled: bool) -> None:
    path = tmp_path / "full.safetensors"
    nbytes = flux_files.write_hollow(path, flux_files.entries_of(flux, dtype, scaled=scaled))
    compute = torch.float16 if dtype == "F16" else torch.bfloat16
    loaded, whole = load_file(path, compute)
    assert_shared(loaded, whole)
    item = 1 if dtype == "F8_E4M3" else 2
    bias = 2 if scaled else item
    assert loaded.copied_bytes == 2 * 3072 * 3072 * item + 2 * 3072 * bias
    assert loaded.copied_bytes < 40e6
    assert len(loaded.model.state_dict()) >= 1156
    if not scaled:
        assert loaded.shared_bytes + loaded.copied_bytes == nbytes
        assert loaded.cast_layers == (0 if item == 2 else 656)


@pytest.mark.parametrize("name", ["dev", "fill", "one head of 128"])
@pytest.mark.parametrize("scales", [None, "scaled_fp8", "weight_scale"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_equals_its_dequantised_self(
    tmp_path: Path, name: str, scales: str | None, dtype: str, compute: torch.dtype
) -> None:
    flux = MODELS[name]
    # Without scales even the norms are fp8, as in the files that are around.
    small = None if scales is None else "BF16"
    stored = flux_files.store(flux_files.random_weights(flux), dtype, scales=scales, small=small)
    path = tmp_path / "fp8.safetensors"
    loaded, whole = load(path, stored, compute)
    before = hashlib.sha256(path.read_bytes()).digest()
    inputs = comfy_inputs(flux, dtype=compute)
    output = run_diffusers(loaded.model, inputs)
    assert_shared(loaded, whole)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    dequantised = {}
    for tensor_name in flux_files.shapes_of(flux):
        tensor = stored[tensor_name].to(compute)
        layer = tensor_name.removesuffix(".weight")
        scale = stored.get(f"{layer}.scale_weight", stored.get(f"{layer}.weight_scale"))
        if scale is not None and tensor_name.endswith(".weight"):
            tensor = tensor * scale.to(compute)
        dequantised[tensor_name] = tensor
    dequantised_model = reference(flux, dequantised).to(compute)
    keep_times_exact(dequantised_model)
    expected = run_diffusers(dequantised_model, inputs)
    assert output.dtype == compute
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def test_half_files_compute_in_fp32_without_copies(tmp_path: Path) -> None:
    weights = flux_files.random_weights(Flux())
    stored = flux_files.store(weights, "BF16", small="F32")
    loaded, whole = load(tmp_path / "mixed.safetensors", stored)
    assert_shared(loaded, whole)
    kinds = {type(layer) for layer in loaded.model.modules()}
    assert CastLinear in kinds
    # Only what is not fp32 already casts.
    assert CastRMSNorm not in kinds
    inputs = comfy_inputs(Flux())
    rounded = {name: tensor.float() for name, tensor in stored.items()}
    expected = run_diffusers(reference(Flux(), rounded), inputs)
    torch.testing.assert_close(run_diffusers(loaded.model, inputs), expected, rtol=0, atol=2e-6)


def test_norms_as_newer_comfyui_saves_them(tmp_path: Path) -> None:
    weights = flux_files.random_weights(Flux())
    renamed = {
        name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in weights.items()
    }
    inputs = comfy_inputs(Flux())
    loaded, _ = load(tmp_path / "renamed.safetensors", renamed)
    expected = run_diffusers(reference(Flux(), weights), inputs)
    torch.testing.assert_close(run_diffusers(loaded.model, inputs), expected, rtol=0, atol=2e-6)


def test_nothing_is_skipped() -> None:
    config = flux_files.detect(flux_files.entries_of(Flux(), "F32"))
    weights = flux_files.random_weights(Flux())
    name = "single_blocks.2.linear1.bias"
    missing = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ValueError, match=f"the tensor {name} is missing"):
        build_flux(config, missing, torch.float32)
    unknown = {**weights, "img_in.weights": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"the tensor img_in\.weights is unknown"):
        build_flux(config, unknown, torch.float32)
    wrong = {**weights, "txt_in.weight": torch.zeros(32, 23)}
    with pytest.raises(RuntimeError, match=r"size mismatch for context_embedder\.weight"):
        build_flux(config, wrong, torch.float32)
    with pytest.raises(ValueError, match=r"cannot compute in torch\.float8"):
        build_flux(config, weights, torch.float8_e4m3fn)


def test_a_tensor_that_only_diffusers_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_buffer(config: object) -> nn.Module:
        model = original(config)
        model.register_buffer("news", torch.empty(3, device="meta"), persistent=False)
        return model

    original = flux_model.empty_flux
    monkeypatch.setattr(flux_model, "empty_flux", with_a_buffer)
    config = flux_files.detect(flux_files.entries_of(Flux(), "F32"))
    with pytest.raises(RuntimeError, match="a tensor that no file has: news"):
        build_flux(config, flux_files.random_weights(Flux()), torch.float32)


def test_bf16_does_not_round_the_time(tmp_path: Path) -> None:
    flux = Flux(heads=4, head_size=16, double=3, single=5)
    weights = flux_files.random_weights(flux)
    exact = run_diffusers(reference(flux, weights), comfy_inputs(flux))
    inputs = comfy_inputs(flux, dtype=torch.bfloat16)
    loaded, _ = load(
        tmp_path / "bf16.safetensors", flux_files.store(weights, "BF16"), torch.bfloat16
    )
    plain = reference(flux, weights).to(torch.bfloat16)

    def error(model: nn.Module) -> float:
        return (run_diffusers(model, inputs).float() - exact).square().mean().sqrt().item()

    assert error(plain) > 4 * error(loaded.model)
    assert error(loaded.model) < 0.02 * exact.std().item()


def test_times_that_cannot_be_kept_are_errors() -> None:
    config = flux_files.detect(flux_files.entries_of(Flux(), "F32"))
    model = build_flux(config, flux_files.random_weights(Flux()), torch.float32).model
    inputs = comfy_inputs(Flux())
    with pytest.raises(TypeError, match="must be called with keywords"):
        model(inputs["x"])
    embedding = model.get_submodule("time_text_embed")
    embedding.register_forward_pre_hook(lambda module, args: args[1:], prepend=True)
    with pytest.raises(RuntimeError, match="embeds 2 values where 2 times and the pooled text"):
        run_diffusers(model, inputs)
