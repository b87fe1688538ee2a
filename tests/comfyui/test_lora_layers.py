"""LoRA patches as ComfyUI holds them, in the ranks' layout; without a ComfyUI."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from xdit_sidecar.protocol import limits

PACKAGE = "xdit_sidecar.comfy_client_node"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
SIDE = 6
ENTRY = tuple[float, Any, float, Any, Any]


class Lora(NamedTuple):
    """What `comfy.weight_adapter.LoRAAdapter` has."""

    weights: tuple[Any, ...]
    name: str = "lora"


def swap_scale_shift(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(weight.chunk(2)[::-1])


@pytest.fixture
def lora_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    comfy, utils = ModuleType("comfy"), ModuleType("comfy.utils")
    vars(utils)["swap_scale_shift"] = swap_scale_shift
    vars(comfy)["utils"] = utils
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    yield importlib.import_module(f"{PACKAGE}.lora_layers")
    for name in ("lora_layers", "refusals"):
        del sys.modules[f"{PACKAGE}.{name}"]


def entry(
    rows: int,
    strength: float = 1.0,
    *,
    start: int | None = None,
    alpha: float | None = None,
    function: Any = None,
) -> ENTRY:
    """One patch of so many rows, of all of them or from ``start`` on."""
    lora = Lora((torch.randn(rows, 2), torch.randn(2, SIDE), alpha, None, None, None))
    return strength, lora, 1.0, None if start is None else (0, start, rows), function


def test_rows_that_do_not_overlap_share_a_layer(lora_layers: Any) -> None:
    patches = {QKV: [entry(SIDE, 0.5, start=SIDE * part, alpha=4.0) for part in range(3)]}
    (layer,) = lora_layers.read_patches(patches)
    module = QKV.removeprefix("diffusion_model.").removesuffix(".weight")
    parts = [f"{module}[{SIDE * n}:{SIDE * (n + 1)}]" for n in range(3)]
    assert layer.tensors.keys() == {f"{p}.{t}" for p in parts for t in ("down", "up", "alpha")}
    assert layer.strength == 0.5


def test_patches_of_the_same_rows_add_up(lora_layers: Any) -> None:
    whole = [entry(3 * SIDE, 0.5), entry(SIDE, 0.5, start=SIDE), entry(SIDE, 0.5, start=0)]
    layers = lora_layers.read_patches({QKV: [*whole, entry(3 * SIDE, -1.0)]})
    assert [(layer.strength, len(layer.tensors)) for layer in layers] == [
        (0.5, 2),
        (0.5, 4),
        (-1, 2),
    ]


def test_ten_files_with_diffusers_names(lora_layers: Any) -> None:
    strengths = [0.1 * number for number in range(1, 11)]
    patches = {QKV: [entry(SIDE, s, start=SIDE * part) for s in strengths for part in range(3)]}
    assert len(lora_layers.read_patches(patches)) == len(strengths)


def test_halves_that_change_places(lora_layers: Any) -> None:
    given = entry(4, function=swap_scale_shift)
    (layer,) = lora_layers.read_patches({"diffusion_model.final.weight": [given]})
    up, down = given[1].weights[:2]
    product = layer.tensors["final.up"] @ layer.tensors["final.down"]
    torch.testing.assert_close(product, swap_scale_shift(up @ down))


def test_what_is_refused(lora_layers: Any) -> None:
    many = {QKV: [entry(SIDE, 0.01 * n) for n in range(limits.JOB_ADAPTERS + 1)]}
    up, down = torch.randn(SIDE, 2), torch.randn(2, SIDE)
    plain = Lora((up, down, None, None, None, None))
    for patches, text in [
        (many, f"{limits.JOB_ADAPTERS + 1} LoRAs at once, of which {limits.JOB_ADAPTERS}"),
        ({QKV: [(1.0, Lora((up, down), "lokr"), 1.0, None, None)]}, "lokr"),
        ({QKV: [(1.0, ("diff", (up,)), 1.0, None, None)]}, "diff"),
        ({QKV: [(1.0, Lora((up, down, None, None, up, None)), 1.0, None, None)]}, "DoRA"),
        ({QKV: [(1.0, plain, 0.5, None, None)]}, "ModelMerge"),
        ({QKV: [(1.0, [(up, None)], 1.0, None, None)]}, "ModelMerge"),
        ({QKV: [(1.0, plain, 1.0, (1, 0, 2), None)]}, "some columns"),
        ({QKV: [entry(SIDE, function=torch.neg)]}, "transformed"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            lora_layers.read_patches(patches)
