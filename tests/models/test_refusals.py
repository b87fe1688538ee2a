"""Files that are no servable FLUX.1: one sentence says what was found and what is supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flux_files
import pytest
from flux_files import PREFIX, Entries, Flux
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_files import memory_file
from xdit_sidecar.daemon.models.flux_detection import detect_flux, detect_flux_file
from xdit_sidecar.protocol.errors import BadFile, UnsupportedModel
from xdit_sidecar.protocol.manifest import TensorSpec
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

GOOD = flux_files.entries_of(Flux())
SUPPORTED = "supported are FLUX.1 transformers (dev, schnell, Kontext, Fill, Canny, Depth)"


def refusal(entries: Entries) -> str:
    specs = [TensorSpec(name, dtype, list(shape)) for name, (dtype, shape) in entries.items()]
    with pytest.raises(UnsupportedModel) as caught:
        detect_flux(specs, "some.safetensors")
    text = str(caught.value)
    assert text.startswith("'some.safetensors' ")
    assert "\n" not in text
    assert len(text) < 700
    return text


def names(*tensors: str) -> Entries:
    return dict.fromkeys(tensors, ("BF16", (4, 4)))


OTHERS = [
    (
        "SDXL",
        names(
            f"{PREFIX}input_blocks.0.0.weight",
            f"{PREFIX}label_emb.0.0.weight",
            "first_stage_model.decoder.conv_in.weight",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        ),
    ),
    ("SDXL", names("add_embedding.linear_1.weight", "time_embedding.linear_1.weight")),
    ("Stable Diffusion 1 or 2", names(f"{PREFIX}input_blocks.0.0.weight", "cond_stage_model.x")),
    (
        "Stable Diffusion 3",
        names(
            f"{PREFIX}joint_blocks.0.context_block.attn.qkv.weight",
            "first_stage_model.decoder.conv_in.weight",
        ),
    ),
    ("Wan", names("blocks.0.self_attn.q.weight", "head.modulation")),
    ("Qwen-Image", names("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    ("FLUX.2", {**GOOD, **names("double_stream_modulation_img.lin.weight")}),
    ("Chroma", {**GOOD, **names("distilled_guidance_layer.norms.0.scale")}),
    ("HunyuanVideo", {**GOOD, **names("txt_in.individual_token_refiner.blocks.0.norm1.weight")}),
    ("a ControlNet", {**GOOD, **names("controlnet_blocks.0.weight")}),
    (
        "a LoRA or another adapter, not a model",
        names("double_blocks.0.img_attn.qkv.lora_A.weight", "img_in.lora_B.weight"),
    ),
    ("a LoRA", names("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight")),
    ("a LoRA", names("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight")),
    (
        "FLUX.1 in the diffusers layout",
        names("single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"),
    ),
    (
        "a Nunchaku (SVDQuant) file",
        names("single_transformer_blocks.0.mlp_fc1.qweight", "transformer_blocks.0.x.wscales"),
    ),
    ("a bitsandbytes file", {**GOOD, **names("img_in.weight.quant_state.bitsandbytes__nf4")}),
    ("an NVFP4 file", {**GOOD, **names("double_blocks.0.img_mlp.0.weight_scale_2")}),
    ("FLUX.1 Redux", names("redux_up.weight", "redux_down.weight")),
    ("a VAE, not a transformer", names("decoder.conv_in.weight", "encoder.conv_in.weight")),
    (
        "a text encoder (T5)",
        names("encoder.block.0.layer.0.SelfAttention.q.weight"),
    ),
    ("a text encoder (CLIP)", names("text_model.encoder.layers.0.mlp.fc1.weight")),
    ("a text encoder (language model)", names("model.layers.0.self_attn.q_proj.weight")),
    ("an image encoder", names("vision_model.encoder.layers.0.mlp.fc1.weight")),
    ("no diffusion model that is known here (its tensors: a, b, c)", names("b", "a", "d", "c")),
]


@pytest.mark.parametrize(("what", "entries"), OTHERS, ids=[what for what, _ in OTHERS])
def test_another_model_is_named(what: str, entries: Entries) -> None:
    text = refusal(entries)
    assert f" is {what}" in text
    assert SUPPORTED in text


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev-Q4.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BadFile, match=r"is a GGUF file: only \.safetensors files are supported"):
        SafetensorsFile.open(path)


def test_a_truncated_full_size_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    nbytes = flux_files.write_hollow(path, flux_files.entries_of(flux_files.DEV))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - nbytes // 3)
    with pytest.raises(BadFile, match=r"is truncated: tensor 'single_blocks\."):
        SafetensorsFile.open(path)


def without(*prefixes: str) -> Entries:
    return {name: entry for name, entry in GOOD.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("entries", "missing"),
    [
        (without("img_in.weight"), "img_in.weight is missing"),
        (without("final_layer."), "final_layer.linear.weight is missing"),
        (
            without("single_blocks.1.linear1."),
            "single_blocks.1.linear1.weight, single_blocks.1.linear1.bias are missing",
        ),
        (without("single_blocks.1."), "single_blocks.1.* is missing"),
        (
            without("double_blocks.0."),
            "double_blocks.0.img_mlp.0.weight, double_blocks.0.img_attn.norm.query_norm.scale are "
            "missing",
        ),
        (without("guidance_in.out_layer.bias"), "guidance_in.out_layer.bias is missing"),
        (
            without("double_blocks.1.img", "time_in."),
            "time_in.in_layer.weight, time_in.in_layer.bias, time_in.out_layer.weight and 13 more "
            "are missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incomplete_file_names_what_is_missing(entries: Entries, missing: str) -> None:
    text = refusal(entries)
    assert f"is an incomplete FLUX.1 transformer: {missing}; " in text
    assert text.endswith("(a shard of a split model cannot be loaded)")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"double_blocks.1.txt_attn.qkv.weight": ("BF16", (96, 31))},
            "has the tensor double_blocks.1.txt_attn.qkv.weight in shape [96, 31], the others need "
            "[96, 32]",
        ),
        ({"img_in.weight": ("BF16", (32,))}, "of an impossible shape, img_in.weight [32]"),
        ({"img_in.weight": ("BF16", (32, 18))}, "takes 18 and gives 16 channels per token"),
        ({"img_in.weight": ("BF16", (0, 16))}, "of an impossible shape, img_in.weight [0, 16]"),
        (
            {"double_blocks.0.img_attn.norm.query_norm.scale": ("BF16", (5,))},
            "has attention heads of 5 elements",
        ),
        (
            {"double_blocks.0.img_attn.norm.query_norm.scale": ("BF16", (4,))},
            "has attention heads of 4 elements",
        ),
        (
            {"double_blocks.0.img_mlp.0.weight": ("BF16", (96, 32))},
            "has MLPs of 96 elements in a model of width 32, FLUX.1 has 4 times the width",
        ),
        (
            {"single_blocks.0.linear2.weight": ("I8", (32, 160))},
            "has the tensor single_blocks.0.linear2.weight in the dtype I8",
        ),
        ({"unheard.of": ("F32", ())}, "tensors that FLUX.1 does not have: unheard.of is unknown"),
        (
            {"single_blocks.77.linear1.weight": ("BF16", (224, 32))},
            "is an incomplete FLUX.1 transformer: single_blocks.3.* is missing",
        ),
        (
            {"single_blocks.99999999999.linear1.weight": ("BF16", (224, 32))},
            "does not have: single_blocks.99999999999.linear1.weight is unknown",
        ),
        (
            {"img_in.weight_scale": ("F32", (32, 1))},
            "has the fp8 scale img_in.weight_scale as F32 [32, 1]: only one number",
        ),
        ({"img_in.weight_scale": ("U8", ())}, "has the fp8 scale img_in.weight_scale as U8 []"),
        (
            {"img_in.weight_scale": ("F32", ()), "img_in.scale_weight": ("F32", ())},
            "has two fp8 scales for img_in",
        ),
        (
            {"single_blocks.0.norm.query_norm.scale_weight": ("F32", ())},
            "single_blocks.0.norm.query_norm.scale_weight is unknown",
        ),
        (
            {"single_blocks.0.norm.query_norm.weight": ("F32", (16,))},
            "has single_blocks.0.norm.query_norm.scale twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_flux_cannot_be_is_named(changes: Entries, problem: str) -> None:
    assert problem in refusal({**GOOD, **changes})


def test_long_and_strange_names_stay_short() -> None:
    entries = {f"{'x' * 200}.{i}": ("F32", (1,)) for i in range(50)}
    assert "…" in refusal(entries)
    specs = [TensorSpec("a", "F32", [1])]
    with pytest.raises(UnsupportedModel) as caught:
        detect_flux(specs, "evil\n" * 100)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def _drop(entries: Entries, name: str) -> None:
    del entries[name]


def _rename(entries: Entries, name: str) -> None:
    entries[f"{name}x"] = entries.pop(name)


def _reshape(entries: Entries, name: str) -> None:
    if name in ("txt_in.weight", "vector_in.in_layer.weight"):
        name = name.replace("weight", "bias")  # their columns are what other encoders would have
    dtype, shape = entries[name]
    entries[name] = (dtype, (*shape[:-1], shape[-1] + 1))


def _retype(entries: Entries, name: str) -> None:
    entries[name] = ("U8", entries[name][1])


@settings(max_examples=200)
@given(
    name=st.sampled_from(sorted(GOOD)),
    change=st.sampled_from([_drop, _rename, _reshape, _retype]),
)
def test_one_changed_tensor_is_never_accepted(
    name: str, change: Callable[[Entries, str], None]
) -> None:
    entries = dict(GOOD)
    change(entries, name)
    refusal(entries)


def test_a_file_is_refused_under_its_label() -> None:
    content = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'
    descriptor = memory_file(len(content).to_bytes(8, "little") + content + b"x")
    with (
        SafetensorsFile(descriptor, "my model.safetensors") as file,
        pytest.raises(UnsupportedModel, match=r"^'my model\.safetensors' is no diffusion model"),
    ):
        detect_flux_file(file)
