"""Names in LoRA files → the neutral layout, and what is refused by name."""

from __future__ import annotations

import pytest
from xdit_sidecar.daemon.models.lora_layout import BranchName, Rows, Source, read_layout
from xdit_sidecar.protocol.errors import UnsupportedModel


def pair(down: str, up: str, rows: int, columns: int) -> dict[str, list[int]]:
    return {down: [4, columns], up: [rows, 4]}


def peft(module: str, rows: int, columns: int) -> dict[str, list[int]]:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight", rows, columns)


@pytest.mark.parametrize(
    ("module", "shape", "neutral"),
    [
        ("diffusion_model.double_blocks.12.img_attn.qkv", (24, 8), "double_blocks.12.img_attn.qkv"),
        ("double_blocks.0.txt_mlp.0", (32, 8), "double_blocks.0.txt_mlp.0"),
        ("lora_unet_double_blocks_7_img_mlp_2", (8, 32), "double_blocks.7.img_mlp.2"),
        ("lora_unet_single_blocks_37_modulation_lin", (24, 8), "single_blocks.37.modulation.lin"),
        ("lora_unet_final_layer_adaLN_modulation_1", (16, 8), "final_layer.adaLN_modulation.1"),
        ("transformer.context_embedder", (8, 16), "txt_in"),
        (
            "transformer.transformer_blocks.3.attn.to_k",
            (8, 8),
            "double_blocks.3.img_attn.qkv[8:16]",
        ),
        ("transformer_blocks.3.attn.add_v_proj", (8, 8), "double_blocks.3.txt_attn.qkv[16:24]"),
        (
            "base_model.model.transformer_blocks.3.ff_context.net.0.proj",
            (32, 8),
            "double_blocks.3.txt_mlp.0",
        ),
        (
            "transformer.single_transformer_blocks.10.proj_mlp",
            (32, 8),
            "single_blocks.10.linear1[24:56]",
        ),
        (
            "lora_transformer_single_transformer_blocks_1_attn_to_q",
            (8, 8),
            "single_blocks.1.linear1[0:8]",
        ),
        ("lycoris_single_transformer_blocks_1_proj_out", (8, 40), "single_blocks.1.linear2"),
    ],
)
def test_names(module: str, shape: tuple[int, int], neutral: str) -> None:
    found = read_layout(peft(module, *shape))
    assert found.sources == {
        f"{neutral}.down": Source(f"{module}.lora_A.weight"),
        f"{neutral}.up": Source(f"{module}.lora_B.weight"),
    }
    assert not found.text_encoder


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_down.weight", ".lora_up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora_A", ".lora_B"),
    ],
)
def test_suffixes(down: str, up: str) -> None:
    names = pair(f"diffusion_model.img_in{down}", f"diffusion_model.img_in{up}", 8, 16)
    found = read_layout({**names, "diffusion_model.img_in.alpha": []})
    assert found.sources.keys() == {"img_in.down", "img_in.up", "img_in.alpha"}


def test_diffusers_last_modulation_has_its_halves_swapped() -> None:
    module = "transformer.norm_out.linear"
    up = f"{module}.lora_B.weight"
    sources = read_layout(peft(module, 16, 8)).sources
    assert sources["final_layer.adaLN_modulation.1[0:8].up"] == Source(up, Rows(8, 16))
    assert sources["final_layer.adaLN_modulation.1[8:16].up"] == Source(up, Rows(0, 8))


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lokr_w1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
        "text_encoders.t5xxl.transformer.shared.lora_A.weight",
    ],
)
def test_text_encoders_are_set_apart(name: str) -> None:
    found = read_layout({name: [4, 8], **peft("transformer.proj_out", 8, 8)})
    assert found.text_encoder == (name,)
    assert len(found.sources) == 2
    assert read_layout({name: [4, 8]}).sources == {}


MODULE = "lora_unet_double_blocks_0_img_attn_qkv"
PAIR = pair(f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", 24, 8)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{MODULE}.lokr_w1", "LoKr"),
        (f"{MODULE}.hada_w1_a", "LoHa"),
        (f"{MODULE}.dora_scale", "DoRA"),
        (f"{MODULE}.lora_magnitude_vector", "DoRA"),
        (f"{MODULE}.lora_mid.weight", "LoCon"),
        ("diffusion_model.img_in.diff", "a full difference"),
        ("diffusion_model.img_in.diff_b", "a full difference"),
        ("diffusion_model.img_in.reshape_weight", "widens"),
        ("diffusion_model.img_in.lora_B.bias", "biases"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "norm"),
        ("diffusion_model.img_in.something", "unknown"),
        ("lora_unet_down_blocks_0_proj.lora_down.weight", "does not have"),
        ("diffusion_model.double_blocks.0.img_attn.norm.query_norm.alpha", "does not have"),
    ],
)
def test_other_kinds_are_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        read_layout({**PAIR, name: [1]}, "'some.safetensors'")
    text = str(error.value)
    assert text.startswith(f"'some.safetensors' cannot run beside FLUX.1: {name} (")
    assert kind in text


def test_many_names_are_not_all_listed() -> None:
    with pytest.raises(UnsupportedModel, match=r"unknown\) and 37 more; supported are"):
        read_layout({f"x{number}": [1] for number in range(40)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "has no tensors"),
        ({"img_in.lora_A.weight": [4, 8]}, "nothing for its up; download"),
        ({f"{MODULE}.alpha": []}, "nothing for its down and up"),
        (pair("img_in.lora_A", "img_in.lora_B", 8, 0), "no matrices"),
        ({"img_in.lora_A": [4, 8], "img_in.lora_B": [8, 5]}, "no matrices"),
        ({"img_in.lora_A": [4, 8, 1, 1], "img_in.lora_B": [8, 4, 1, 1]}, "no matrices"),
        (
            {**pair("img_in.lora_A", "img_in.lora_B", 8, 8), "img_in.lora_A.weight": [4, 8]},
            "two names for one tensor",
        ),
        ({**PAIR, **peft("diffusion_model.double_blocks.0.img_attn.qkv", 24, 8)}, "twice"),
    ],
)
def test_incomplete_and_contradictory_files_are_refused(
    shapes: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_layout(shapes)


@pytest.mark.parametrize("text", ["a.b.0", "a[0:5]"])
def test_branch_names_go_both_ways(text: str) -> None:
    assert str(BranchName.parse(text)) == text


@pytest.mark.parametrize("text", ["", "a[1]", "a[0:1", "a[-1:2]", "[0:1]", "a[0:1][0:1]"])
def test_what_is_no_branch_name(text: str) -> None:
    with pytest.raises(ValueError, match="names no branch"):
        BranchName.parse(text)
