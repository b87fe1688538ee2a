"""Text encoders apart from their numbers: full-size names, and what is refused."""

from __future__ import annotations

import pytest
import torch
from ranks.components.component_files import T5, Clip, Tensors, hollow, random_weights, specs_of
from xdit_sidecar.daemon.models.text_encoder_detection import detect_clip, detect_t5
from xdit_sidecar.daemon.models.text_encoder_layers import clip_layers, t5_layers
from xdit_sidecar.daemon.ranks.casting import CastLinear
from xdit_sidecar.daemon.ranks.text_encoders.clip import ClipEncoder, _empty_clip, build_clip
from xdit_sidecar.daemon.ranks.text_encoders.layers import CastEmbedding
from xdit_sidecar.daemon.ranks.text_encoders.t5 import T5Encoder, _empty_t5, build_t5

CLIP = random_weights(Clip(width=32, layers=1, vocabulary=50).shapes())
TINY_T5 = random_weights(T5(layers=1).shapes())


def clip_of(tensors: Tensors) -> ClipEncoder:
    return build_clip(detect_clip(specs_of(CLIP), "clip"), tensors)


def t5_of(tensors: Tensors) -> T5Encoder:
    return build_t5(detect_t5(specs_of(TINY_T5), "t5"), tensors)


def test_every_full_size_parameter_has_its_tensor() -> None:
    clip = detect_clip(hollow(Clip(768, 12).shapes()), "clip_l")
    t5 = detect_t5(hollow(T5(4096, 64, 64, 10240, 24, 32128).shapes()), "t5xxl")
    for model, layers in ((_empty_clip(clip), clip_layers(clip)), (_empty_t5(t5), t5_layers(t5))):
        shapes = {name: shape for layer in layers for name, shape in layer.shapes.items()}
        for name, parameter in model.named_parameters():
            known = name.removeprefix("text_model.")
            known = known.replace("encoder.embed_tokens.", "shared.")
            assert list(parameter.shape) == shapes.pop(known)
        assert not shapes


def test_layers_that_need_no_cast_stay_as_they_are() -> None:
    clip, t5 = clip_of(CLIP), t5_of(TINY_T5)
    assert clip.cast_layers == t5.cast_layers == 0
    assert not any(isinstance(module, CastLinear) for module in clip.model.modules())
    assert clip.shared_bytes == sum(tensor.nbytes for tensor in CLIP.values())
    assert t5.shared_bytes == sum(tensor.nbytes for tensor in TINY_T5.values())


@pytest.mark.parametrize(("build", "tensors"), [(clip_of, CLIP), (t5_of, TINY_T5)])
def test_tensors_are_all_used_and_all_needed(build: type, tensors: Tensors) -> None:
    missing = dict(tensors)
    name, _ = missing.popitem()
    with pytest.raises(ValueError, match=rf"{name.removeprefix('text_model.')} is missing"):
        build(missing)
    with pytest.raises(ValueError, match="the tensor other is unknown"):
        build({**tensors, "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        build({**tensors, name: torch.zeros(3)})


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(77).long(), torch.zeros(1, 77), torch.zeros(0, 77).long(), torch.zeros(1, 0)],
)
def test_tokens_of_another_shape(tokens: torch.Tensor) -> None:
    for encoder in (clip_of(CLIP), t5_of(TINY_T5)):
        with pytest.raises(ValueError, match=r"give int64 \[batch, length\]"):
            encoder.encode(tokens)


def test_tokens_that_do_not_exist() -> None:
    for encoder in (clip_of(CLIP), t5_of(TINY_T5)):
        for wrong in (-1, encoder.config.vocabulary):
            with pytest.raises(ValueError, match="use the tokenizer that belongs to it"):
                encoder.encode(torch.full((1, 77), wrong))


def test_clip_takes_one_length() -> None:
    with pytest.raises(ValueError, match="76 tokens: CLIP takes 77"):
        clip_of(CLIP).encode(torch.zeros(1, 76).long())


def test_fp8_tables_give_no_nan() -> None:
    table = torch.nn.Embedding(3, 2).requires_grad_(False)
    table.weight = torch.nn.Parameter(
        torch.tensor([[1.5, 2], [torch.nan, -2], [0, 1]]).to(torch.float8_e4m3fn),
        requires_grad=False,
    )
    rows = CastEmbedding(table)(torch.tensor([1, 0]))
    assert rows.tolist() == [[0, -2], [1.5, 2]]
