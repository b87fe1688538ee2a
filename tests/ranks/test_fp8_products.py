"""Products in fp8: near the exact ones, of shared bytes where the file has fp8, told where not."""

from __future__ import annotations

from collections.abc import Iterator

import flux_files
import lora_files
import pytest
import torch
from flux_files import Flux
from flux_inputs import comfy_inputs
from torch import Tensor, nn
from xdit_sidecar.daemon.ranks.flux import fp8_products
from xdit_sidecar.daemon.ranks.flux.adapters import LoraStack, applied
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledForward
from xdit_sidecar.daemon.ranks.flux.fp8_products import Fp8Linear, own_bytes, use_fp8_products
from xdit_sidecar.daemon.ranks.flux.latents import to_inputs
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

pytestmark = [
    pytest.mark.allow_leaks("torch's compiler keeps what it opened for the process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in xfuser and its own
]

FLUX = Flux(heads=4, double=2, single=2)
CONFIG = flux_files.detect(flux_files.entries_of(FLUX))
# Rounding to e4m3 is off by 2**-4 at most and 0.026 at the mean square; there are two factors.
NEAR = 0.06


@pytest.fixture(autouse=True)
def fresh_probe() -> Iterator[None]:
    fp8_products._refusal.cache_clear()
    yield
    fp8_products._refusal.cache_clear()


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in flux_files.random_weights(FLUX).items()}


def model(tensors: dict[str, Tensor], *, fp8: bool) -> ParallelFlux:
    load_xfuser(torch.device("cpu"))
    built = build_flux(CONFIG, tensors, torch.bfloat16).model
    if fp8:
        use_fp8_products(built)
    return ParallelFlux(built)


def inputs() -> FluxInputs:
    given = comfy_inputs(FLUX, height=12, width=10, text=9)
    return to_inputs(CONFIG, **given, compute_dtype=torch.bfloat16)[0]  # type: ignore[arg-type]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_gives_the_product_of_its_rounded_factors(dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    linear.weight[5] *= 50  # rows have scales of their own
    tokens = torch.randn(2, 7, 64).to(dtype)
    tokens[0, 3] *= 50
    tokens[1, 2] = 0
    layer = Fp8Linear(linear)
    found = layer(tokens)
    assert (found.dtype, found.shape) == (dtype, (2, 7, 48))

    rounded, scales = fp8_products.round_rows(tokens.reshape(-1, 64).float())
    weight = layer.weight.float() * layer.weight_scale.t()
    bias = linear.bias.to(torch.bfloat16).float()
    expected = (rounded.float() * scales) @ weight.t() + bias
    torch.testing.assert_close(found.reshape(-1, 48).float(), expected, rtol=2**-7, atol=1e-2)
    assert torch.equal(found[1, 2].float(), bias)
    linear.weight[5] /= 50
    tokens[0, 3] /= 50
    assert difference(Fp8Linear(linear)(tokens), linear(tokens)) < NEAR


def test_an_output_is_near_the_exact_one_and_the_weights_are_untouched() -> None:
    tensors = weights()
    before = {name: t.clone() for name, t in tensors.items()}
    exact = model(tensors, fp8=False).compute(inputs())
    found = model(tensors, fp8=True).compute(inputs())
    assert 1e-3 < difference(found, exact) < 0.15
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_modulations_and_what_lies_outside_of_the_blocks_stay_exact() -> None:
    flux = model(weights(), fp8=True).model
    exact = {n for n, layer in flux.named_modules() if type(layer) is nn.Linear}
    inside = {name for name in exact if "transformer_blocks" in name}
    assert inside
    assert all(".norm" in name for name in inside)
    assert {"x_embedder", "context_embedder", "proj_out"} <= exact


def test_copies_are_counted_before_they_are_made() -> None:
    flux = model(weights(), fp8=False).model
    told = own_bytes(flux)
    use_fp8_products(flux)
    layers = [layer for layer in flux.modules() if isinstance(layer, Fp8Linear)]
    assert told == sum(layer.weight.nbytes + layer.weight_scale.nbytes for layer in layers) > 0


def test_an_fp8_file_is_used_as_it_is() -> None:
    tensors = weights(torch.float8_e4m3fn)
    flux = build_flux(CONFIG, tensors, torch.bfloat16).model
    assert own_bytes(flux) == 0
    use_fp8_products(flux)
    shared = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    layers = [layer for layer in flux.modules() if isinstance(layer, Fp8Linear)]
    assert layers
    assert all(layer.weight.untyped_storage().data_ptr() in shared for layer in layers)


def test_the_scale_of_an_fp8_weight_counts() -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    cast = fp8_products.CastLinear(linear, scaled=True)
    cast.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    cast.weight_scale = torch.tensor(3.0)
    tokens = torch.randn(4, 32, dtype=torch.bfloat16)
    assert difference(Fp8Linear(cast)(tokens), cast(tokens)) < NEAR


def test_loras_are_added_as_to_other_layers() -> None:
    tensors = weights()
    lora = {n: t.to(torch.bfloat16) for n, t in lora_files.neutral(FLUX).items()}
    stack = LoraStack.build(CONFIG, [(lora, 1.0)], torch.bfloat16, "cpu")
    results = []
    for fp8 in (False, True):
        flux = model(tensors, fp8=fp8)
        with applied(flux.model, stack):
            results.append(flux.compute(inputs()))
        assert difference(results[-1], flux.compute(inputs())) > 0.01  # it adds something
    assert difference(results[1], results[0]) < 0.15


def test_compiled_blocks_give_the_same() -> None:
    torch.compiler.reset()
    forward = CompiledForward(model(weights(), fp8=True), backend="eager")
    expected = forward._compute(inputs(), None)
    while forward.compilation.next_piece is not None:
        forward.compile_piece()
    assert forward.compilation.state == "compiled", forward.compilation.reason
    assert difference(forward._compute(inputs(), None), expected) < 0.02


def test_a_device_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with 8.9\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    flux = build_flux(CONFIG, weights(), torch.bfloat16).model
    with pytest.raises(ValueError, match=r"cannot multiply in fp8 \(torch\._scaled_mm is only"):
        use_fp8_products(flux)
    assert not any(isinstance(layer, Fp8Linear) for layer in flux.modules())
