"""Products of FLUX.1's blocks in fp8, where a job asks for them: faster, and not exact.

Both factors are e4m3 (https://arxiv.org/abs/2209.05433) with a scale for each row of tokens and
each output, found anew for the tokens of every call; sums are wider, outputs bf16: torch's
``_scaled_mm``. Modulations, embedders and the final layer stay as they are: they are small, and
everything depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..casting import CastLinear

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST_SCALE = 1e-12  # of a row of zeros
_GRANULE = 16  # what the kernels want both inner and outer sizes to be multiples of
_MODULATIONS = ("norm", "norm1", "norm1_context")


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in e4m3; for inputs of any floating dtype.

    ``weight`` [out, in] e4m3, ``weight_scale`` [1, out] fp32, ``bias`` [out] of any dtype or None.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch's own annotation is too narrow
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """In the place of ``linear``. Its e4m3 weight is used as it is, another one is rounded."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        given = linear.weight.detach()
        scale = getattr(linear, "weight_scale", None)
        if given.dtype == _E4M3:
            weight = given
            ones = torch.ones(1, self.out_features, device=given.device)
            row_scales = ones if scale is None else ones * scale.float()
        else:
            wide = given.float() if scale is None else given.float() * scale.float()
            weight, columns = round_rows(wide)
            row_scales = columns.reshape(1, -1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("weight_scale", row_scales)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out], in the input's dtype."""
        tokens, scales = round_rows(input.reshape(-1, self.in_features).float())
        product: Tensor = torch._scaled_mm(
            tokens,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.weight_scale,
            bias=None if self.bias is None else self.bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] fp32 to e4m3 and fp32 scales [rows, 1], whose product it nearly is."""
    scales = (matrix.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (matrix / scales).to(_E4M3), scales


def own_bytes(model: nn.Module) -> int:
    """What :func:`use_fp8_products` allocates for ``model``; fp8 files need next to nothing."""
    return sum(
        layer.weight.numel() + 4 * layer.out_features
        for _, _, layer in _layers(model)
        if layer.weight.dtype != _E4M3
    )


def use_fp8_products(model: nn.Module) -> None:
    """Replace the linear layers of a FluxTransformer2DModel's blocks.

    Raises ValueError where the weights' device cannot multiply in fp8.
    """
    layers = list(_layers(model))
    if layers and (why := _refusal(layers[0][2].weight.device)):
        raise ValueError(
            f"this device cannot multiply in fp8 ({why}): use another weight_dtype, or leave out "
            "--fp8-matmul"
        )
    for parent, name, layer in layers:
        setattr(parent, name, Fp8Linear(layer))


def _layers(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer."""
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for path, layer in block.named_modules():
            parent, _, name = path.rpartition(".")
            if type(layer) not in (nn.Linear, CastLinear) or parent in _MODULATIONS:
                continue
            if layer.in_features % _GRANULE == 0 and layer.out_features % _GRANULE == 0:
                yield block.get_submodule(parent), name, layer


@cache
def _refusal(device: torch.device) -> str | None:
    layer = nn.Linear(_GRANULE, _GRANULE, device=device, dtype=torch.bfloat16)
    try:
        Fp8Linear(layer)(torch.ones(1, _GRANULE, device=device, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None
