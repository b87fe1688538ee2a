"""ComfyUI's call to FLUX's inputs and back: against ComfyUI's own forward, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfyui_checkout
import flux_files
import pytest
import torch
from comfy_flux_arguments import module_arguments
from flux_files import Flux
from flux_inputs import Inputs, comfy_inputs
from safetensors.torch import load_file, save_file
from xdit_sidecar.daemon.ranks.flux.latents import Placement, from_tokens, to_inputs
from xdit_sidecar.daemon.ranks.flux.missing_guidance import allow_missing_guidance
from xdit_sidecar.daemon.ranks.flux.model import build_flux

PROGRAM = Path(__file__).with_name("comfy_flux_calls.py")
TINY = Flux(double=1, single=1)
PARITY = 1e-5


@dataclass(frozen=True)
class Case:
    """One call. ``changes`` replace inputs; None takes them away."""

    flux: Flux = TINY
    size: tuple[int, int] = (12, 8)
    references: tuple[tuple[int, int], ...] = ()
    method: str | None = None
    batch: int = 2
    changes: dict[str, torch.Tensor | None] = dataclasses.field(default_factory=dict)
    within: float = PARITY


SEVERAL = ((6, 10), (7, 4), (9, 9), (4, 12))
CASES = {
    "even": Case(),
    "odd": Case(size=(7, 11)),
    "odd height": Case(size=(9, 8), batch=1),
    "a single pixel": Case(size=(1, 1)),
    "fill": Case(Flux(double=1, single=1, inputs=288), size=(5, 6)),
    "one reference": Case(references=((6, 10),)),
    "offset": Case(size=(7, 8), references=SEVERAL, method="offset"),
    "index": Case(size=(7, 8), references=SEVERAL, method="index"),
    "uxo": Case(size=(7, 8), references=SEVERAL, method="uxo"),
    "no guidance": Case(changes={"guidance": None}),
    "guidance for schnell": Case(
        Flux(double=1, single=1, guidance=False), changes={"guidance": torch.tensor([4.0, 4.0])}
    ),
    "guidance in bf16": Case(
        changes={"guidance": torch.tensor([3.5, 2.7], dtype=torch.bfloat16)},
        within=1e-3,  # ComfyUI's sinusoids, too, are bf16 then; in a bf16 model they always are
    ),
    "single times": Case(
        changes={"guidance": torch.tensor([3.0]), "timestep": torch.tensor([0.6])}
    ),
    "no pooled text": Case(changes={"y": None}),
    "wide pooled text": Case(changes={"y": torch.linspace(-1, 1, 2 * 20).reshape(2, 20)}),
}


def inputs_of(case: Case) -> Inputs:
    height, width = case.size
    inputs = comfy_inputs(case.flux, height=height, width=width, batch=case.batch)
    generator = torch.Generator().manual_seed(5)
    for number, size in enumerate(case.references):
        shape = (case.batch, case.flux.inputs // 4, *size)
        inputs[f"ref{number}"] = torch.randn(shape, generator=generator)
    for name, value in case.changes.items():
        inputs.pop(name, None)
        if value is not None:
            inputs[name] = value
    return inputs


def prepare(flux: Flux, inputs: Inputs, method: str | None = None) -> Any:
    config = flux_files.detect(flux_files.entries_of(flux))
    return to_inputs(
        config,
        inputs["x"],
        inputs["timestep"],
        inputs["context"],
        inputs.get("y"),
        inputs.get("guidance"),
        [inputs[name] for name in sorted(inputs) if name.startswith("ref")],
        **({} if method is None else {"ref_latents_method": method}),  # type: ignore[arg-type]
        compute_dtype=torch.float32,
    )


def predict(model: torch.nn.Module, given: Any) -> torch.Tensor:
    arguments = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    with torch.no_grad():
        (tokens,) = model(**arguments, return_dict=False)
    assert isinstance(tokens, torch.Tensor)
    return tokens


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Case → ComfyUI's output; one process answers them all."""
    comfyui = comfyui_checkout.comfyui()
    folder = tmp_path_factory.mktemp("latents")
    jobs = []
    for number, case in enumerate(CASES.values()):
        names = ("weights", "inputs", "output")
        paths = {name: str(folder / f"{number}-{name}.safetensors") for name in names}
        flux_files.write(Path(paths["weights"]), flux_files.random_weights(case.flux))
        save_file(inputs_of(case), paths["inputs"])
        jobs.append({**paths, "model": module_arguments(case.flux), "method": case.method})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), str(comfyui), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: load_file(job["output"])["output"] for name, job in zip(CASES, jobs, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_comfyui(theirs: dict[str, torch.Tensor], name: str) -> None:
    case = CASES[name]
    config = flux_files.detect(flux_files.entries_of(case.flux))
    model = build_flux(config, flux_files.random_weights(case.flux), torch.float32).model
    allow_missing_guidance(model)
    given, placement = prepare(case.flux, inputs_of(case), case.method)
    ours = from_tokens(predict(model, given), placement)
    assert ours.shape == (case.batch, case.flux.latent_channels, *case.size)
    assert theirs[name].std() > 0.1
    assert (ours - theirs[name]).abs().max().item() <= case.within


def test_guidance_in_bf16_is_embedded_as_comfyui_rounds_it() -> None:
    given, _ = prepare(TINY, inputs_of(CASES["guidance in bf16"]))
    assert torch.allclose(given.guidance * 1000, torch.tensor([3504.0, 2704.0]), rtol=1e-6)


def test_missing_guidance_is_forgotten_after_one_call() -> None:
    config = flux_files.detect(flux_files.entries_of(TINY))
    model = build_flux(config, flux_files.random_weights(TINY), torch.float32).model
    given, _ = prepare(TINY, inputs_of(Case()))
    before = predict(model, given)
    allow_missing_guidance(model)
    without = predict(model, dataclasses.replace(given, guidance=None))
    assert torch.equal(predict(model, given), before)
    assert not torch.allclose(without, before, atol=1e-2)


def test_dtypes() -> None:
    config = flux_files.detect(flux_files.entries_of(TINY))
    inputs = {name: t.to(torch.float16) for name, t in comfy_inputs(TINY).items()}
    given, _ = to_inputs(
        config,
        *inputs.values(),
        compute_dtype=torch.bfloat16,  # type: ignore[arg-type]
    )
    tokens = (given.hidden_states, given.encoder_hidden_states, given.pooled_projections)
    assert {tensor.dtype for tensor in tokens} == {torch.bfloat16}
    exact = (given.timestep, given.guidance, given.img_ids, given.txt_ids)
    assert {tensor.dtype for tensor in exact} == {torch.float32}


def test_tokens_go_back_where_they_came_from() -> None:
    latent = torch.arange(2 * 4 * 5 * 7, dtype=torch.float32).reshape(2, 4, 5, 7)
    given, placement = prepare(
        TINY, {**comfy_inputs(TINY), "x": latent, "ref0": torch.zeros(2, 4, 2, 2)}
    )
    assert placement == Placement(5, 7, 3 * 4 + 1)
    assert torch.equal(from_tokens(given.hidden_states, placement), latent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 16, 12, 8)}, "x has 16 channels, but this .* takes 4"),
        ({"x": torch.zeros(2, 4, 12)}, r"x has shape \(2, 4, 12\)"),
        ({"x": torch.zeros(2, 4, 0, 8)}, "x has shape"),
        ({"ref0": torch.zeros(1, 4, 6, 6)}, r"ref_latents\[0\] has 1 rows, but x has 2"),
        ({"ref0": torch.zeros(2, 16, 6, 6)}, r"ref_latents\[0\] has 16 channels"),
        ({"context": torch.zeros(1, 7, 24)}, r"context has shape \(1, 7, 24\)"),
        ({"context": torch.zeros(2, 7, 23)}, r"needs \(2, tokens, 24\)"),
        ({"y": torch.zeros(2, 11)}, r"y has shape \(2, 11\); this model needs \(2, 12\)"),
        ({"y": torch.zeros(1, 12)}, "y has shape"),
        ({"timestep": torch.zeros(3)}, r"timestep has shape \(3,\)"),
        ({"guidance": torch.zeros(())}, r"guidance has shape \(\)"),
    ],
)
def test_impossible_shapes_are_refused(changes: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(TINY, {**comfy_inputs(TINY), **changes})


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'beside'; use one of: offset, index, uxo"):
        prepare(TINY, comfy_inputs(TINY), "beside")


@pytest.mark.parametrize("shape", [(2, 12, 16), (2, 13, 15), (12, 16)])
def test_tokens_of_another_forward_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not of this forward, which has 13 image tokens"):
        from_tokens(torch.zeros(shape), Placement(5, 7, 13))
