"""Weights files that are something else than FLUX.1, recognised by parts of their tensors' names.

The names are those under which these models are published. The first match counts: what is built
on another model (adapters, quantised files, FLUX.2) stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable

_DIFFUSION_MODELS = (
    ("a Nunchaku (SVDQuant) file", (".wscales", ".smooth_orig", ".smooth_factor_orig")),
    ("a bitsandbytes file", (".quant_state.bitsandbytes", ".weight.absmax")),
    ("an NVFP4 file", (".weight_scale_2",)),
    (
        "a LoRA or another adapter, not a model",
        (
            *(".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up."),
            *(".hada_w1_a", ".lokr_w1", ".oft_blocks", ".dora_scale", ".diff_b"),
        ),
    ),
    ("FLUX.1 Redux, not a transformer", ("redux_up.",)),
    ("a ControlNet", ("controlnet_", "control_model.", "input_hint_block.")),
    ("Chroma", ("distilled_guidance_layer.",)),
    ("FLUX.2", ("double_stream_modulation_img.",)),
    ("HunyuanVideo or HunyuanImage", ("individual_token_refiner.", "context_embedder.token_ref")),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.1.",)),
    ("HiDream", ("double_stream_blocks.",)),
    ("AuraFlow", ("double_layers.0.", "joint_transformer_blocks.")),
    ("FLUX.1 in the diffusers layout", ("single_transformer_blocks.", "time_text_embed.guidance")),
    ("Stable Diffusion 3", ("joint_blocks.", "transformer_blocks.0.norm1_context.")),
    ("SDXL", ("label_emb.0.", "add_embedding.linear_1.")),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.", "time_embedding.linear_1.")),
    ("Wan", ("head.modulation", "condition_embedder.time_embedder.")),
    ("Lumina or Z-Image", ("cap_embedder.",)),
    ("LTX-Video or PixArt", ("adaln_single.",)),
    ("Mochi", ("t5_yproj.",)),
)
_OTHER_COMPONENTS = (
    ("an image encoder (CLIP vision), not a transformer", ("vision_model.", "visual.")),
    (
        "a VAE, not a transformer",
        ("decoder.conv_in.", "decoder.mid", "first_stage_model.", "decoder.conv1."),
    ),
    ("a text encoder (T5), not a transformer", (".SelfAttention.",)),
    ("a text encoder (CLIP), not a transformer", ("text_model.encoder.", "transformer.resblocks.")),
    ("a text encoder (language model), not a transformer", (".self_attn.q_proj.",)),
)


def recognise_diffusion_model(names: Iterable[str]) -> str | None:
    """What other diffusion model, or which of its adapters, has these tensors; None: not known."""
    return _recognise(_DIFFUSION_MODELS, names)


def recognise_component(names: Iterable[str]) -> str | None:
    """Which other part of a pipeline has these tensors; None: not known.

    Ask only about files without a diffusion model: whole checkpoints have these parts beside it.
    """
    return _recognise(_OTHER_COMPONENTS, names)


def _recognise(table: tuple[tuple[str, tuple[str, ...]], ...], names: Iterable[str]) -> str | None:
    everything = "\n".join(names)
    for what, parts in table:
        if any(part in everything for part in parts):
            return what
    return None
