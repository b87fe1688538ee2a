"""What is read from the header of a text encoder's file, and which files are refused."""

from __future__ import annotations

import pytest
from ranks.components.component_files import (
    T5,
    Clip,
    Shapes,
    hollow,
    random_weights,
    specs_of,
    store,
)
from xdit_sidecar.daemon.models.text_encoder_config import ClipConfig, T5Config
from xdit_sidecar.daemon.models.text_encoder_detection import (
    detect_clip,
    detect_t5,
    detect_text_encoder,
)
from xdit_sidecar.protocol.errors import UnsupportedModel
from xdit_sidecar.protocol.manifest import TensorSpec

CLIP = Clip(vocabulary=300).shapes()
TINY_T5 = T5().shapes()
CLIP_L = Clip(768, 12)
T5_XXL = T5(4096, 64, 64, 10240, 24, 32128)
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def refusal(shapes: Shapes, dtype: str = "BF16", *extra: TensorSpec) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        detect_text_encoder([*hollow(shapes, dtype), *extra], "some.safetensors")
    text = str(caught.value)
    assert text.startswith("'some.safetensors' ")
    assert len(text) < 500
    return text


def test_clip_l() -> None:
    config = detect_text_encoder(hollow(CLIP_L.shapes(), "F16"), "clip_l.safetensors")
    nbytes = 123_060_480 * 2
    assert config == ClipConfig(49408, 77, 768, 3072, 12, ("F16",), False, "", nbytes)
    assert isinstance(config, ClipConfig)
    assert (config.heads, config.end_token) == (12, 49407)


def test_t5_xxl() -> None:
    config = detect_text_encoder(hollow(T5_XXL.shapes()), "t5xxl_bf16.safetensors")
    nbytes = 4_762_310_656 * 2
    assert config == T5Config(32128, 4096, 64, 64, 10240, 24, 32, ("BF16",), False, "", nbytes)


def test_heads_and_head_size_of_a_small_t5() -> None:
    config = detect_t5(hollow(TINY_T5), "tiny")
    assert (config.width, config.heads, config.head_size, config.layers) == (48, 4, 8, 3)


@pytest.mark.parametrize(
    ("width", "heads"), [(768, 12), (64, 1), (16, 1), (96, 1), (160, 2), (200, 2), (1024, 16)]
)
def test_heads_of_clip(width: int, heads: int) -> None:
    shapes = Clip(width, 1, vocabulary=9).shapes()
    assert detect_clip(hollow(shapes), "tiny").heads == heads


@pytest.mark.parametrize(
    ("prefix", "shapes"),
    [
        ("clip_l.transformer.", CLIP),
        ("text_encoders.clip_l.transformer.", CLIP),
        ("t5xxl.transformer.", TINY_T5),
        ("text_encoders.t5xxl.transformer.", TINY_T5),
    ],
)
def test_prefixes(prefix: str, shapes: Shapes) -> None:
    specs = hollow({f"{prefix}{name}": shape for name, shape in shapes.items()})
    specs += hollow({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)})
    config = detect_text_encoder(specs, "whole")
    assert config.prefix == prefix
    assert isinstance(config, ClipConfig) == (shapes is CLIP)


def test_checkpoints_with_both() -> None:
    shapes = {f"text_encoders.clip_l.transformer.{name}": s for name, s in CLIP.items()}
    shapes |= {f"text_encoders.t5xxl.transformer.{name}": s for name, s in TINY_T5.items()}
    assert "has two text encoders, CLIP (text_encoders.clip_l" in refusal(shapes)
    assert detect_clip(hollow(shapes), "whole").vocabulary == 300
    assert detect_t5(hollow(shapes), "whole").vocabulary == 120


def test_fp8_and_its_scales() -> None:
    weights = random_weights(TINY_T5)
    scaled = detect_t5(specs_of(store(weights, "F8_E4M3", scaled=True)), "scaled")
    assert scaled.scaled
    assert set(scaled.dtypes) == {"F8_E4M3", "BF16", "F32"}
    plain = detect_t5(specs_of(store(weights, "F8_E4M3")), "fp8")
    assert (plain.scaled, plain.dtypes) == (False, ("F8_E4M3",))


def test_tensors_that_are_not_used() -> None:
    unused = hollow({"text_projection.weight": (64, 64), "logit_scale": ()}, "F32")
    unused.append(TensorSpec("text_model.embeddings.position_ids", "I64", [1, 77]))
    assert detect_clip([*hollow(CLIP), *unused], "clip_l").width == 64
    alias = hollow({"encoder.embed_tokens.weight": (120, 48)})
    assert detect_t5([*hollow(TINY_T5), *alias], "t5").width == 48


OTHERS = [
    (Clip(1280, 32, vocabulary=9).shapes(), "is CLIP-H or CLIP-G (32 layers), not CLIP-L"),
    (CLIP | {"vision_model.post_layernorm.bias": (4,)}, "is a whole CLIP with its image encoder"),
    ({"transformer.resblocks.0.ln_1.weight": (4,)}, "is CLIP in the layout of OpenCLIP"),
    ({"model.layers.0.self_attn.k_proj.weight": (4, 4)}, "is a language model, not CLIP"),
    (TINY_T5 | {"decoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "is a whole T5"),
    (
        TINY_T5 | {BIAS.replace("block.0", "block.1"): (32, 4)},
        "is UMT5, Wan's text encoder",
    ),
    (
        TINY_T5 | {"encoder.block.0.layer.1.DenseReluDense.wi.weight": (4, 4)},
        "is T5 version 1.0, without gated GELU",
    ),
    ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "is a VAE, not a text encoder"),
    ({"double_blocks.0.img_mod.lin.bias": (4,)}, "is a FLUX.1 transformer, not a text encoder"),
    ({"x.lora_A.weight": (4, 4)}, "is a LoRA, not a text encoder"),
    ({"input_blocks.0.0.weight": (4, 4)}, "is Stable Diffusion 1 or 2"),
    ({}, "is not a CLIP text encoder (its tensors: none)"),
    (CLIP | {"text_model.extra": (4,)}, "does not have: extra"),
    (CLIP | {"embeddings.token_embedding.weight": (300, 64)}, "twice"),
    (TINY_T5 | {"shared.scale_weight": ()}, "does not have: shared.scale_weight"),
    (TINY_T5 | {BIAS: (32, 5)}, "has attention of 32 elements in 5 heads, with 32 buckets"),
    (TINY_T5 | {"shared.weight": (120, 40)}, "in shape [32, 48], the others need [32, 40]"),
    (TINY_T5 | {"shared.weight": (120,)}, "in the impossible shape [120]"),
]


@pytest.mark.parametrize(("shapes", "sentence"), OTHERS, ids=[sentence for _, sentence in OTHERS])
def test_refusals(shapes: Shapes, sentence: str) -> None:
    text = refusal(shapes)
    assert sentence in text
    assert "supported are FLUX.1's text encoders" in text


@pytest.mark.parametrize("shapes", [CLIP, TINY_T5], ids=["clip", "t5"])
def test_truncated_files(shapes: Shapes) -> None:
    for kept in range(1, len(shapes)):
        text = refusal(dict(list(shapes.items())[:kept]))
        assert "text encoder, but incomplete: without" in text
    text = refusal(dict(list(shapes.items())[2:]))
    assert "text encoder, but incomplete: without" in text


def test_dtypes_and_scales_that_nobody_has() -> None:
    assert "in the dtype F8_E5M2" in refusal(CLIP, "F8_E5M2")
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    many = TensorSpec(f"{layer}.scale_weight", "F32", [32])
    assert "has the fp8 scale" in refusal(TINY_T5, "F8_E4M3", many)
    two = [TensorSpec(f"{layer}.{leaf}", "F32", []) for leaf in ("scale_weight", "weight_scale")]
    assert f"has two fp8 scales for {layer}" in refusal(TINY_T5, "F8_E4M3", *two)
    strided = TensorSpec("shared.weight", "BF16", [120, 48], 0, [1, 120])
    rest = {name: shape for name, shape in TINY_T5.items() if name != "shared.weight"}
    assert "in another order than row-major" in refusal(rest, "BF16", strided)
