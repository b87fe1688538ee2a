"""Layers that cast their weights where they are used, each alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from xdit_sidecar.daemon.ranks.flux.casting import CastLinear, use_casts


def test_a_scaled_weight_of_the_inputs_dtype_is_not_written() -> None:
    # Casting copies nothing here, and multiplying in place would write to the shared bytes.
    linear = nn.Linear(5, 3, bias=False).requires_grad_(False)
    before = linear.weight.clone()
    layer = CastLinear(linear, scaled=True)
    layer.weight_scale = torch.tensor(0.5)
    given = torch.randn(2, 5)
    for _ in range(2):
        torch.testing.assert_close(layer(given), given @ before.T * 0.5)
    assert torch.equal(linear.weight, before)
    assert layer.weight is linear.weight


def test_layers_that_need_no_cast_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.RMSNorm(2))
    untouched = model[0]
    state = model.state_dict()
    state["1.bias"] = state["1.bias"].half()
    state["2.weight"] = state["2.weight"].bfloat16()
    assert use_casts(model, state, torch.float32) == 2
    assert model[0] is untouched
    model.requires_grad_(False).load_state_dict(state, assign=True)
    assert [parameter.dtype for parameter in model.parameters()][-2:] == [
        torch.float16,
        torch.bfloat16,
    ]
    assert model(torch.ones(1, 2)).dtype == torch.float32


def test_a_layer_that_cannot_cast_is_named() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    state = {"norm.weight": torch.ones(4, dtype=torch.float16)}
    with pytest.raises(TypeError, match="norm, a LayerNorm, cannot cast its weights at use"):
        use_casts(model, state, torch.float32)
