"""LoRA as side branches: against merged weights and against ComfyUI's own patched weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import comfyui_checkout
import flux_files
import lora_files
import pytest
import torch
from comfy_flux_arguments import module_arguments
from flux_files import Flux
from flux_inputs import comfy_inputs, run_diffusers
from lora_files import Tensors
from safetensors.torch import load_file, save_file
from xdit_sidecar.daemon.ranks.flux.adapters import LoraStack, applied, from_file
from xdit_sidecar.daemon.ranks.flux.model import build_flux

PROGRAM = Path(__file__).with_name("comfy_lora.py")
TINY = Flux(double=2, single=2)
CONFIG = flux_files.detect(flux_files.entries_of(TINY))
WIDTH = TINY.width
QKV = "double_blocks.1.img_attn.qkv"
LINEAR1 = "single_blocks.1.linear1"
PARITY = 1e-5


def stack_of(*loras: tuple[Mapping[str, torch.Tensor], float]) -> LoraStack:
    return LoraStack.build(CONFIG, loras, torch.float32, "cpu")


def merged(*loras: tuple[Mapping[str, torch.Tensor], float]) -> Tensors:
    """The weights with every branch added to the rows it is for, in fp32."""
    weights = flux_files.random_weights(TINY)
    for tensors, strength in loras:
        for name in tensors:
            if not name.endswith(".down"):
                continue
            branch = name.removesuffix(".down")
            down, up = tensors[name], tensors[f"{branch}.up"]
            alpha = tensors.get(f"{branch}.alpha", torch.tensor(float(down.shape[0])))
            module, _, rows = branch.removesuffix("]").partition("[")
            start, stop = (int(row) for row in rows.split(":")) if rows else (0, up.shape[0])
            weight = weights[f"{module}.weight"]
            weight[start:stop] += strength * alpha.item() / down.shape[0] * (up @ down)
    return weights


def output_with(weights: Tensors, stack: LoraStack | None = None) -> torch.Tensor:
    model = build_flux(CONFIG, weights, torch.float32).model
    with applied(model, stack):
        return run_diffusers(model, comfy_inputs(TINY))


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def only(tensors: Tensors, module: str) -> Tensors:
    return {name: t for name, t in tensors.items() if name.startswith(f"{module}.")}


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return output_with(flux_files.random_weights(TINY))


def range_pair(module: str, start: int, stop: int, seed: int) -> Tensors:
    columns = lora_files.weights_of(TINY)[module][1]
    down, up = lora_files.pair(stop - start, columns, torch.Generator().manual_seed(seed))
    return {f"{module}[{start}:{stop}].down": down, f"{module}[{start}:{stop}].up": up}


def check(plain: torch.Tensor, *loras: tuple[Mapping[str, torch.Tensor], float]) -> None:
    ours = output_with(flux_files.random_weights(TINY), stack_of(*loras))
    assert largest_difference(ours, output_with(merged(*loras))) <= PARITY
    assert largest_difference(ours, plain) > 1e-3


@pytest.mark.parametrize("module", lora_files.weights_of(Flux(double=1, single=1)))
def test_each_module_equals_merged_weights(plain: torch.Tensor, module: str) -> None:
    check(plain, (only(lora_files.neutral(TINY, alpha=2.0), module), 1.5))


def test_whole_loras_equal_merged_weights(plain: torch.Tensor) -> None:
    check(plain, (lora_files.neutral(TINY, 1, alpha=1.0), 0.7), (lora_files.neutral(TINY, 2), -0.4))


@pytest.mark.parametrize(
    ("module", "start", "stop"),
    [
        (QKV, 0, WIDTH),
        (QKV, WIDTH, 2 * WIDTH),
        (QKV, 2 * WIDTH, 3 * WIDTH),
        (QKV, WIDTH - 5, 2 * WIDTH + 3),
        (LINEAR1, 0, 3 * WIDTH),
        (LINEAR1, 3 * WIDTH, 7 * WIDTH),
        (LINEAR1, 3 * WIDTH + 1, 7 * WIDTH - 1),
        ("final_layer.adaLN_modulation.1", 0, WIDTH),
        ("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH),
        ("final_layer.adaLN_modulation.1", WIDTH - 3, WIDTH + 7),
        ("img_in", 3, 4),
    ],
)
def test_ranges_equal_merged_weights(
    plain: torch.Tensor, module: str, start: int, stop: int
) -> None:
    check(plain, (range_pair(module, start, stop, 1), 3.0))


def test_several_branches_of_one_module(plain: torch.Tensor) -> None:
    whole = only(lora_files.neutral(TINY), QKV)
    check(plain, (whole | range_pair(QKV, 0, 40, 3) | range_pair(QKV, 20, 96, 4), 1.0))


def test_stacks_do_not_touch_each_other_or_the_weights() -> None:
    weights = flux_files.random_weights(TINY)
    model = build_flux(CONFIG, weights, torch.float32).model
    inputs = comfy_inputs(TINY)
    stacks = [stack_of((lora_files.neutral(TINY, seed), 0.5)) for seed in (1, 2)]
    alone = [output_with(flux_files.random_weights(TINY), stack) for stack in (None, *stacks)]
    for _ in range(2):
        for stack, expected in zip((None, *stacks), alone, strict=True):
            with applied(model, stack):
                assert torch.equal(run_diffusers(model, inputs), expected)
    assert torch.equal(run_diffusers(model, inputs), alone[0])
    for name, tensor in flux_files.random_weights(TINY).items():
        assert torch.equal(weights[name], tensor), name


def changed(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that are not what they were built as."""
    return [layer for layer in model.modules() if "Branched" in type(layer).__name__]


def test_an_exception_leaves_no_branch_behind() -> None:
    model = build_flux(CONFIG, flux_files.random_weights(TINY), torch.float32).model
    inputs = comfy_inputs(TINY)
    before = run_diffusers(model, inputs)
    stack = stack_of((lora_files.neutral(TINY), 1.0))
    wrong = {**inputs, "context": inputs["context"][..., :-1]}
    with pytest.raises(RuntimeError), applied(model, stack):  # noqa: PT012
        assert changed(model)
        run_diffusers(model, wrong)
    assert not changed(model)
    assert torch.equal(run_diffusers(model, inputs), before)


def test_a_stack_of_another_model_leaves_no_branch_behind() -> None:
    smaller = Flux(double=1, single=1)
    config = flux_files.detect(flux_files.entries_of(smaller))
    model = build_flux(config, flux_files.random_weights(smaller), torch.float32).model
    stack = stack_of((lora_files.neutral(TINY), 1.0))
    with (
        pytest.raises(ValueError, match=r"no linear layer .*blocks\.1"),
        applied(model, stack),
    ):
        pass
    assert not changed(model)


def test_layers_with_one_weight_are_told_apart_or_refused() -> None:
    model = build_flux(CONFIG, flux_files.random_weights(TINY), torch.float32).model
    queries = [model.get_submodule(f"transformer_blocks.{n}.attn.to_q") for n in range(2)]
    queries[0].weight = queries[1].weight  # type: ignore[assignment]
    stack = stack_of((only(lora_files.neutral(TINY), QKV), 1.0))
    with pytest.raises(ValueError, match="to_q has its weight in common"), applied(model, stack):
        pass
    with applied(model, stack_of((only(lora_files.neutral(TINY), LINEAR1), 1.0))):
        run_diffusers(model, comfy_inputs(TINY))


def test_nested_stacks_add_up(plain: torch.Tensor) -> None:
    one, other = lora_files.neutral(TINY, 1), lora_files.neutral(TINY, 2)
    model = build_flux(CONFIG, flux_files.random_weights(TINY), torch.float32).model
    with applied(model, stack_of((one, 0.5))), applied(model, stack_of((other, 0.3))):
        nested = run_diffusers(model, comfy_inputs(TINY))
    assert largest_difference(nested, output_with(merged((one, 0.5), (other, 0.3)))) <= PARITY
    assert largest_difference(nested, plain) > 1e-2


def test_tensors_of_the_compute_dtype_are_not_copied() -> None:
    tensors = lora_files.neutral(TINY)
    stack = stack_of((tensors, 1.0))
    assert stack.copied_bytes == 0
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for branches in stack.branches.values():
        for branch in branches:
            assert branch.down.untyped_storage().data_ptr() in storages
            assert branch.up.untyped_storage().data_ptr() in storages
    half = {name: tensor.half() for name, tensor in tensors.items()}
    expected = sum(tensor.nbytes for tensor in tensors.values())
    assert stack_of((half, 1.0)).copied_bytes == expected


def test_zero_strength_adds_nothing() -> None:
    tensors = lora_files.neutral(TINY, alpha=1.0)
    assert not stack_of((tensors, 0.0)).branches
    assert not stack_of((lora_files.neutral(TINY, alpha=0.0), 1.0)).branches


@pytest.mark.parametrize(("dtype", "scales"), [("BF16", None), ("F8_E4M3", "scaled_fp8")])
def test_layers_that_cast_at_use(dtype: str, scales: str | None) -> None:
    stored = flux_files.store(flux_files.random_weights(TINY), dtype, scales=scales)
    model = build_flux(CONFIG, stored, torch.float32).model
    inputs = comfy_inputs(TINY)
    lora = lora_files.neutral(TINY)
    with applied(model, stack_of((lora, 0.5))):
        ours = run_diffusers(model, inputs)
    exact = output_with(merged((lora, 0.5)))
    base = output_with(flux_files.random_weights(TINY))
    rounding = largest_difference(run_diffusers(model, inputs), base)
    assert largest_difference(ours, exact) < 3 * rounding < largest_difference(exact, base)


def test_bf16_is_as_exact_as_bf16_can_be() -> None:
    stored = flux_files.store(flux_files.random_weights(TINY), "BF16")
    lora = {name: tensor.bfloat16() for name, tensor in lora_files.neutral(TINY).items()}
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_flux(CONFIG, stored, dtype).model
        with applied(model, LoraStack.build(CONFIG, [(lora, 0.5)], dtype, "cpu")):
            outputs.append(run_diffusers(model, comfy_inputs(TINY, dtype=dtype)).float())
    assert largest_difference(*outputs) < 0.1 * outputs[0].std().item()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"img_in.middle": torch.zeros(1)}, "img_in.middle is no down, up or alpha"),
        ({"img_in.down": torch.zeros(3, 16)}, "img_in has no up"),
        ({"img_in.alpha": torch.ones(())}, "img_in has no down and no up"),
        ({"image_in.down": torch.zeros(3, 16)}, "no weight image_in"),
        ({"double_blocks.2.img_mlp.0.down": torch.zeros(3, 32)}, "no weight double_blocks.2"),
        ({f"{QKV}.norm.down": torch.zeros(3, 32)}, "no weight"),
        (range_pair("img_in", 0, 32, 0) | {"img_in[0:32].alpha": torch.ones(2)}, "one number"),
        (range_pair("img_in", 0, 32, 0) | {"img_in[0:32].alpha": torch.tensor(1e39)}, "finite"),
        (range_pair("img_in", 0, 33, 0), r"img_in\[0:33\]: the weight has 32 rows"),
        ({"img_in[5:5].down": torch.zeros(1, 16), "img_in[5:5].up": torch.zeros(0, 1)}, "32 rows"),
        ({"img_in[a:b].down": torch.zeros(1, 16)}, "names no branch"),
        ({"img_in.down": torch.zeros(1, 16), "img_in.up": torch.zeros(31, 1)}, r"\[32, rank\]"),
        ({"img_in.down": torch.zeros(1, 15), "img_in.up": torch.zeros(32, 1)}, r"\[rank, 16\]"),
        ({"img_in.down": torch.zeros(1, 16), "img_in.up": torch.zeros(32, 2)}, "another model"),
        ({"img_in.down": torch.tensor(1.0), "img_in.up": torch.zeros(32, 1)}, "another model"),
        ({"img_in.down": torch.zeros(1, 16, dtype=torch.int8)}, "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: Tensors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_of((tensors, 1.0))


def test_strength_must_be_finite() -> None:
    with pytest.raises(ValueError, match="strength is nan"):
        stack_of(({}, float("nan")))


# --- files

FILES = {
    "kohya": lora_files.kohya(TINY, 1),
    "diffusers": lora_files.diffusers(TINY, 2),
    "prefixed": lora_files.bfl(TINY, 3),
    "onetrainer": {
        name.replace(".lora_A.", "+lora_down.").replace(".lora_B.", "+lora_up.")
        .replace(".", "_").replace("+", ".").replace("_weight", ".weight")
        .replace("transformer_", "lora_transformer_", 1): tensor
        for name, tensor in lora_files.diffusers(TINY, 4).items()
    },
    "query, key and value together": {
        f"diffusion_model.single_blocks.0.linear1_qkv.lora_{part}.weight": tensor
        for part, tensor in zip(
            ("down", "up"), lora_files.pair(96, 32, torch.Generator().manual_seed(6)), strict=True
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """File → ComfyUI's patched weights; one process answers them all."""
    comfyui = comfyui_checkout.comfyui()
    folder = tmp_path_factory.mktemp("lora")
    weights = folder / "weights.safetensors"
    flux_files.write(weights, flux_files.random_weights(TINY))
    jobs = []
    for number, tensors in enumerate(FILES.values()):
        lora, output = (str(folder / f"{number}-{kind}.safetensors") for kind in ("lora", "output"))
        save_file(tensors, lora)
        jobs.append(
            {
                "weights": str(weights),
                "lora": lora,
                "output": output,
                "model": module_arguments(TINY),
                "strength": 0.8,
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "lora key not loaded" not in done.stderr
    return {name: load_file(job["output"]) for name, job in zip(FILES, jobs, strict=True)}


@pytest.mark.parametrize("name", FILES)
def test_files_equal_comfyui(patched: dict[str, Tensors], plain: torch.Tensor, name: str) -> None:
    lora = from_file(FILES[name])
    assert not lora.text_encoder
    theirs = output_with(patched[name])
    ours = output_with(flux_files.random_weights(TINY), stack_of((lora.tensors, 0.8)))
    assert largest_difference(theirs, plain) > 1e-2
    assert largest_difference(ours, theirs) <= PARITY


def test_files_are_read_without_a_copy() -> None:
    for tensors in FILES.values():
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        neutral = from_file(tensors).tensors.values()
        assert {tensor.untyped_storage().data_ptr() for tensor in neutral} == storages


def test_tensors_for_text_encoders_are_reported() -> None:
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    lora = from_file({**FILES["kohya"], name: torch.zeros(3, 3)})
    assert lora.text_encoder == (name,)
    assert lora.tensors.keys() == from_file(FILES["kohya"]).tensors.keys()
