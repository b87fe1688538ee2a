"""What is read from the header of a VAE file, and which files are refused."""

from __future__ import annotations

import pytest
from ranks.components.component_files import Shapes, SmallVae, hollow, with_bias
from xdit_sidecar.daemon.models.vae_config import VaeConfig
from xdit_sidecar.daemon.models.vae_detection import detect_vae
from xdit_sidecar.daemon.models.vae_layers import vae_layers
from xdit_sidecar.daemon.models.vae_memory import TILE, decode_bytes, needs_tiles
from xdit_sidecar.protocol.errors import UnsupportedModel

FLUX = SmallVae(128, (1, 2, 4, 4), 2)
GOOD = SmallVae().shapes()


def refusal(shapes: Shapes, dtype: str = "BF16", *, supported: bool = True) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        detect_vae(hollow(shapes, dtype), "some.safetensors")
    text = str(caught.value)
    assert text.startswith("'some.safetensors' ")
    assert ("supported are VAEs of FLUX.1's kind" in text) == supported
    assert len(text) < 500
    return text


def flux_config() -> VaeConfig:
    return detect_vae(hollow(FLUX.shapes(), "F32"), "ae.safetensors")


def test_flux_ae() -> None:
    config = flux_config()
    assert config == VaeConfig((128, 256, 512, 512), 2, 16, ("F32",), "", 83_819_683 * 4)
    assert config.ratio == 8
    assert sum(len(layer.shapes) for layer in vae_layers(config)) == 244


@pytest.mark.parametrize(
    "small", [SmallVae(), SmallVae(64, (1, 3), 3), SmallVae(32, (1, 1, 2, 1, 2), 1)], ids=str
)
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_sizes_and_prefixes(small: SmallVae, prefix: str) -> None:
    shapes = {f"{prefix}{name}": shape for name, shape in small.shapes().items()}
    if prefix:
        shapes |= {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}
    config = detect_vae(hollow(shapes, "F16"), "whole")
    assert config.widths == tuple(small.channels * multiplier for multiplier in small.multipliers)
    assert (config.blocks, config.ratio, config.prefix) == (small.blocks, small.ratio, prefix)


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (SmallVae(latent=4).shapes(), "is a VAE of 4 latent channels without quant_conv"),
        (
            SmallVae(latent=4).shapes() | with_bias("post_quant_conv", 4, 4, 1, 1),
            "is a VAE of 4 latent channels with quant_conv",
        ),
        (
            GOOD | with_bias("quant_conv", 32, 32, 1, 1),
            "is a VAE of 16 latent channels with quant_conv",
        ),
        (SmallVae(latent=32).shapes() | {"bn.running_mean": (128,)}, "is FLUX.2's VAE"),
        ({"decoder.conv_in.weight": (8, 8, 3, 3, 3)}, "is a VAE for video"),
        ({"decoder.up_blocks.0.resnets.0.norm1.weight": (4,)}, "a VAE in the diffusers layout"),
        ({"decoder.middle.0.residual.0.gamma": (4,)}, "is Wan's or Qwen-Image's VAE"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "a FLUX.1 transformer, not a VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "a text encoder, not a VAE"),
        ({"input_blocks.0.0.weight": (4, 4)}, "is Stable Diffusion 1 or 2"),
        ({"a": (1,), "b": (1,)}, "is not a VAE of FLUX.1's kind (its tensors: a, b)"),
        ({}, "(its tensors: none)"),
        (SmallVae(48, (1, 1)).shapes(), "has levels of (48, 48) channels, which 32 must divide"),
        (GOOD | {"decoder.extra": (1,)}, "does not have: decoder.extra"),
        (GOOD | {"scaled_fp8": (0,)}, "does not have: scaled_fp8"),
        (GOOD | {"encoder.mid.attn_1.q.weight": (64, 64)}, "in shape [64, 64], the others need"),
        (GOOD | {"decoder.conv_in.weight": (64, 0, 3, 3)}, "impossible shape [64, 0, 3, 3]"),
    ],
)
def test_refusals(shapes: Shapes, sentence: str) -> None:
    assert sentence in refusal(shapes)


@pytest.mark.parametrize("kept", [1, 40, len(GOOD) // 2, len(GOOD) - 1])
def test_truncated_files(kept: int) -> None:
    shapes = dict(list(GOOD.items())[:kept])
    assert "is a VAE of FLUX.1's kind, but incomplete: without" in refusal(shapes, supported=False)


def test_a_missing_level() -> None:
    shapes = {name: s for name, s in GOOD.items() if not name.startswith("encoder.down.1.")}
    assert "without encoder.down.1.*" in refusal(shapes, supported=False)


def test_fp8_is_refused() -> None:
    assert "in the dtype F8_E4M3" in refusal(GOOD, "F8_E4M3")


def test_memory_of_a_decode() -> None:
    config = flux_config()
    # ComfyUI's number for FLUX at 1024 by 1024 in bf16.
    assert decode_bytes(config, 128, 128, "BF16") == 2178 * 128 * 128 * 64 * 2
    small = detect_vae(hollow(GOOD), "small")
    assert decode_bytes(small, 128, 128, "BF16") * 4 == decode_bytes(config, 128, 128, "BF16")
    enough = decode_bytes(config, 128, 128, "F32")
    assert not needs_tiles(config, 128, 128, "F32", enough)
    assert needs_tiles(config, 128, 128, "F32", enough - 1)
    assert not needs_tiles(config, TILE, TILE, "F32", 0)
