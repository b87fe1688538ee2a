"""A text encoder file's tensors under the names of transformers' modules, all of them views."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from ...models.flux_layers import FP8_MARKER, UNUSED_LEAVES, WEIGHT_SCALES
from ...models.text_encoder_layers import TextLayer
from ..casting import SCALE, Twins, use_casting_twins


def map_weights(
    layers: Iterable[TextLayer],
    tensors: Mapping[str, torch.Tensor],
    unused: Collection[str],
    rename: Callable[[str], str] = str,
) -> dict[str, torch.Tensor]:
    """Every tensor of ``layers`` under the name that it has there; nothing is copied.

    ``tensors`` have names without prefix. Scales of fp8 weights come out as 0-dimensional
    ``<layer>.weight_scale``. Raises ValueError for a tensor that is missing, and for one that is
    neither known nor ``unused``.
    """
    left = {rename(name): tensor for name, tensor in tensors.items()}
    state: dict[str, torch.Tensor] = {}
    for layer in layers:
        for name in layer.shapes:
            tensor = left.pop(name, None)
            if tensor is None:
                raise ValueError(f"the tensor {name} is missing")
            state[name] = tensor
        if layer.linear:
            for leaf in UNUSED_LEAVES:
                left.pop(f"{layer.name}.{leaf}", None)
            for leaf in WEIGHT_SCALES:
                scale = left.pop(f"{layer.name}.{leaf}", None)
                if scale is not None:
                    state[f"{layer.name}.{SCALE}"] = scale.reshape(())
    for name in (*unused, FP8_MARKER):
        left.pop(name, None)
    if left:
        raise ValueError(f"the tensor {min(left)} is unknown ({len(left)} such)")
    return state


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], twins: Twins) -> int:
    """Make the tensors of ``state`` the parameters of a model on meta, to be computed in fp32.

    Returns the number of layers that cast at use. Raises RuntimeError where shapes differ or the
    model has a tensor that no file has.
    """
    cast_layers = use_casting_twins(model, state, torch.float32, twins)
    # Before the tensors come in: assigning keeps the flag, and fp8 could not have it.
    model.requires_grad_(False)
    model.load_state_dict(state, strict=True, assign=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"this version of transformers gives the model a tensor that no file has: {name}"
            )
    model.eval()
    return cast_layers


def check_tokens(tokens: torch.Tensor, vocabulary: int) -> None:
    """Raise ValueError unless these are indices [batch, length] into the vocabulary.

    On a GPU a wrong index would end the process's CUDA context.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(
            f"tokens of shape {list(tokens.shape)} and {tokens.dtype}: give int64 [batch, length]"
        )
    least, most = (int(bound) for bound in torch.aminmax(tokens))
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"tokens from {least} to {most}, but this text encoder has {vocabulary}: use the "
            "tokenizer that belongs to it"
        )
