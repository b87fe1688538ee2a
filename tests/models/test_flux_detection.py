"""What a FLUX.1 file is, from its header alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flux_files
import project
import pytest
from flux_files import DEPTH, DEV, FILL, PREFIX, SCHNELL, Flux, detect
from xdit_sidecar.daemon.models.flux_config import FluxConfig
from xdit_sidecar.daemon.models.flux_detection import detect_flux, detect_flux_file
from xdit_sidecar.daemon.models.flux_layers import flux_layers
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile


@pytest.mark.parametrize(
    ("flux", "dtype", "variant", "gigabytes"),
    [
        (DEV, "BF16", "FLUX.1 dev or Kontext", 23.80),
        (DEV, "F8_E4M3", "FLUX.1 dev or Kontext", 11.90),
        (SCHNELL, "BF16", "FLUX.1 schnell", 23.78),
        (SCHNELL, "F32", "FLUX.1 schnell", 47.56),
        (FILL, "BF16", "FLUX.1 Fill", 23.80),
        (DEPTH, "F16", "FLUX.1 Canny or Depth", 23.80),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_full_size_files(
    tmp_path: Path, flux: Flux, dtype: str, variant: str, gigabytes: float
) -> None:
    path = tmp_path / "full.safetensors"
    nbytes = flux_files.write_hollow(path, flux_files.entries_of(flux, dtype))
    assert path.stat().st_blocks * 512 < 1 << 20
    with SafetensorsFile.open(path) as file:
        config = detect_flux_file(file)
    assert config == FluxConfig(
        in_channels=flux.inputs,
        out_channels=64,
        hidden_size=3072,
        head_size=128,
        mlp_size=12288,
        double_blocks=19,
        single_blocks=38,
        context_width=4096,
        pooled_width=768,
        guidance=flux.guidance,
        dtypes=(dtype,),
        scaled=False,
        prefix="",
        nbytes=nbytes,
    )
    assert (config.heads, config.rope_axes, config.mlp_ratio) == (24, (16, 56, 56), 4.0)
    assert config.variant == variant
    assert nbytes / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_scaled_fp8_file() -> None:
    config = detect(flux_files.entries_of(DEV, "F8_E4M3", scaled=True))
    assert config.scaled
    assert config.dtypes == ("F8_E4M3", "BF16", "F32")
    assert config.variant == "FLUX.1 dev or Kontext"


@pytest.mark.parametrize("scales", ["scaled_fp8", "weight_scale"])
def test_both_namings_of_scales_in_a_real_file(tmp_path: Path, scales: str) -> None:
    path = tmp_path / "scaled.safetensors"
    weights = flux_files.store(
        flux_files.random_weights(Flux()), "F8_E4M3", scales=scales, small="F16"
    )
    flux_files.write(path, weights, PREFIX)
    with SafetensorsFile.open(path) as file:
        config = detect_flux_file(file)
    assert config.scaled
    assert config.prefix == PREFIX
    assert config.dtypes[0] == "F8_E4M3"
    assert set(config.dtypes) == {"F8_E4M3", "F16", "F32"} | (
        {"U8"} if scales == "weight_scale" else set()
    )


def test_a_whole_checkpoint_is_its_transformer() -> None:
    transformer = flux_files.entries_of(Flux(), "F16")
    entries = {f"{PREFIX}{name}": entry for name, entry in transformer.items()}
    entries["vae.decoder.conv_in.weight"] = ("F32", (8, 4, 3, 3))
    entries["text_encoders.t5xxl.transformer.shared.weight"] = ("F16", (32, 24))
    entries["text_encoders.clip_l.transformer.text_model.encoder.x"] = ("I8", (3,))
    config = detect(entries)
    assert config.prefix == PREFIX
    assert config.dtypes == ("F16",)
    assert config.nbytes == detect(transformer).nbytes


def test_norms_as_newer_comfyui_saves_them() -> None:
    entries = flux_files.entries_of(Flux())
    renamed = {
        name.replace("_norm.scale", "_norm.weight"): entry for name, entry in entries.items()
    }
    assert renamed.keys() != entries.keys()
    assert detect(renamed) == detect(entries)


@pytest.mark.parametrize(
    ("flux", "axes"),
    [
        (Flux(heads=1, head_size=128), (16, 56, 56)),
        (Flux(heads=3, head_size=64), (8, 28, 28)),
        (Flux(heads=5, head_size=32), (4, 14, 14)),
        (Flux(heads=4, head_size=16), (4, 6, 6)),
        (Flux(heads=2, head_size=24, double=1, single=0, guidance=False), (4, 10, 10)),
        (Flux(heads=7, head_size=6, inputs=288), (2, 2, 2)),
    ],
    ids=str,
)
def test_every_size_comes_from_the_shapes(flux: Flux, axes: tuple[int, int, int]) -> None:
    config = detect(flux_files.entries_of(flux, "F16"))
    assert (config.heads, config.head_size, config.rope_axes) == (flux.heads, flux.head_size, axes)
    assert (config.double_blocks, config.single_blocks) == (flux.double, flux.single)
    assert (config.context_width, config.pooled_width) == (flux.context, flux.pooled)
    assert (config.in_channels, config.out_channels) == (flux.inputs, flux.channels)
    assert config.guidance == flux.guidance
    assert sum(axes) == flux.head_size


def test_variants_by_channels() -> None:
    variants = {
        inputs: detect(flux_files.entries_of(Flux(inputs=inputs))).variant
        for inputs in (16, 32, 288, 40)
    }
    assert variants == {
        16: "FLUX.1 dev or Kontext",
        32: "FLUX.1 Canny or Depth",
        288: "FLUX.1 Fill",
        40: "FLUX.1 with 40 input channels",
    }


def test_the_layer_table_has_each_tensor_once() -> None:
    config = detect(flux_files.entries_of(DEV))
    tensors = [item for layer in flux_layers(config) for item in layer.shapes.items()]
    found = [(name, tuple(shape)) for name, shape in tensors]
    assert len(found) == 780
    assert dict(found) == flux_files.shapes_of(DEV)


def test_a_manifest_is_detected_like_its_file() -> None:
    # A rank learns the sizes from the region's table, whose tensors have offsets.
    entries = flux_files.entries_of(Flux())
    specs = [
        TensorSpec(name, dtype, list(shape), 512 * i)
        for i, (name, (dtype, shape)) in enumerate(entries.items())
    ]
    assert detect_flux(specs, "region") == detect(entries)


def test_detection_needs_no_torch() -> None:
    modules = project.modules_below(f"{project.PACKAGE}.daemon.models")
    assert len(modules) >= 5
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
sys.exit(any(heavy in sys.modules for heavy in ("torch", "numpy", "diffusers")))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project.ROOT.anchor)
