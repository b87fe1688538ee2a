"""Compiled forwards give what eager ones give, or are not used; by compilers that are quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flux_files
import lora_files
import pytest
import torch
from flux_files import Flux
from flux_inputs import comfy_inputs
from torch import Tensor, fx
from torch._dynamo.utils import counters
from xdit_sidecar.daemon.ranks.flux.adapters import LoraStack, applied
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledForward, CompiledShares
from xdit_sidecar.daemon.ranks.flux.latents import to_inputs
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.parallel.attention import Exchange, LocalExchange
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

pytestmark = [
    pytest.mark.allow_leaks("torch's compiler keeps what it opened for the process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in xfuser and its own
]

FLUX = Flux(heads=4, double=2, single=2)
WEIGHTS = flux_files.random_weights(FLUX)
CONFIG = flux_files.detect({name: ("F32", tuple(t.shape)) for name, t in WEIGHTS.items()})


class Scene:
    """A tiny transformer, and what it computes."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        load_xfuser(torch.device("cpu"))
        # Code is kept by function, so another test's would be found.
        torch.compiler.reset()
        counters.clear()
        self.flux = ParallelFlux(build_flux(CONFIG, dict(WEIGHTS), torch.float32).model)
        self.forward = CompiledForward(self.flux, backend=backend)

    @property
    def graphs(self) -> int:
        """How many pieces of code were made."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def state(self) -> str:
        return self.forward.compilation.state

    def compute(self, inputs: FluxInputs) -> Tensor:
        return self.forward._compute(inputs, None)

    def compile(self) -> None:
        """Everything that waits for it."""
        while self.forward.compilation.next_piece is not None:
            self.forward.compile_piece()


def inputs(height: int = 12, width: int = 10, text: int = 9, rows: int = 1) -> FluxInputs:
    given = comfy_inputs(FLUX, height=height, width=width, text=text, batch=rows)
    return to_inputs(CONFIG, **given, compute_dtype=torch.float32)[0]  # type: ignore[arg-type]


def perturbing(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """A compiler that is wrong by a tenth of a percent of nothing in particular."""

    def run(*args: Any) -> Any:
        return tuple(out + 1e-3 if isinstance(out, Tensor) else out for out in graph(*args))

    return run


def failing(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """A compiler that finds no C compiler."""
    raise OSError("no cc here")


def test_sizes_share_code_and_agree() -> None:
    scene = Scene("eager")
    first = inputs()
    expected = scene.flux.compute(first)
    assert torch.equal(scene.compute(first), expected)
    assert (scene.state, scene.graphs) == ("compiling", 0)
    scene.compile()
    # One for each kind: the next block, and the next size, need no other.
    assert (scene.state, scene.graphs) == ("compiled", 2)
    assert torch.equal(scene.compute(first), expected)
    for others in (inputs(16, 12, 7), inputs(8, 8, 33), inputs(2, 4, 2)):
        expected = scene.flux.compute(others)
        for _ in range(2):  # compared, then compiled
            assert torch.equal(scene.compute(others), expected)
        assert (scene.state, scene.graphs) == ("compiled", 2)
    # One row is code of its own in torch.
    more = inputs(rows=2)
    expected = scene.flux.compute(more)
    assert torch.equal(scene.compute(more), expected)
    assert (scene.state, scene.graphs) == ("compiling", 2)
    scene.compile()
    assert torch.equal(scene.compute(more), expected)
    for others in (inputs(rows=3), inputs(8, 8, 33, rows=2)):
        assert torch.equal(scene.compute(others), scene.flux.compute(others))
    assert (scene.state, scene.graphs) == ("compiled", 4)

    # LoRA branches are hooks, and compiled blocks know nothing of them.
    lora = lora_files.neutral(FLUX)
    stack = LoraStack.build(CONFIG, [(lora, 1.0)], torch.float32, "cpu")
    with applied(scene.flux.model, stack):
        with_branches = scene.flux.compute(first)
    assert not torch.equal(with_branches, scene.flux.compute(first))
    assert torch.equal(scene.compute(first), scene.flux.compute(first))
    assert scene.graphs == 4


def test_wrong_code_is_refused() -> None:
    scene = Scene(perturbing)
    first = inputs()
    expected = scene.flux.compute(first)
    scene.compute(first)
    scene.compile()
    assert scene.state == "refused"
    assert "double block 0 differs" in str(scene.forward.compilation.reason)
    assert torch.equal(scene.compute(first), expected)


def test_a_compiler_that_fails_is_not_asked_again() -> None:
    scene = Scene(failing)
    first = inputs()
    expected = scene.flux.compute(first)
    scene.compute(first)
    scene.compile()
    assert scene.state == "refused"
    assert "no cc here" in str(scene.forward.compilation.reason)
    assert torch.equal(scene.compute(first), expected)


def test_inputs_that_cannot_be_judged_are_put_off() -> None:
    scene = Scene("eager")
    first = inputs()
    first.hidden_states[0, 0, 0] = torch.nan
    scene.compute(first)
    scene.forward.compile_piece()
    assert scene.state == "eager"


class Doubling(Exchange):
    """An exchange that shows whether it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls += 1
        return 2 * LocalExchange().attend(query, key, value)


def test_shares_run_compiled() -> None:
    scene = Scene("eager")
    shares = CompiledShares(scene.flux, ways=2, backend="eager")
    first, exchange = inputs(), Doubling()
    expected = scene.flux.compute(first, Doubling())
    assert torch.equal(shares._compute(first, exchange), expected)
    asked = exchange.calls
    while shares.compilation.next_piece is not None:
        shares.compile_piece()
    # Nothing travels while a rank compiles.
    assert (shares.compilation.state, scene.graphs, exchange.calls) == ("compiled", 2, asked)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(shares._compute(first, exchange), expected)
    assert exchange.calls == 2 * asked
    # Nor while it compares: what a rank has to say about a new size it finds out by itself.
    second = inputs(16, 12, 7)
    expected = scene.flux.compute(second, Doubling())
    for times in (3, 4):
        assert torch.equal(shares._compute(second, exchange), expected)
        assert (exchange.calls, scene.graphs) == (times * asked, 2)


def test_shares_for_which_there_is_no_code_run_eagerly() -> None:
    scene = Scene("eager")
    shares = CompiledShares(scene.flux, ways=2, backend="eager")
    first, exchange = inputs(), Doubling()
    expected = scene.flux.compute(first, Doubling())
    shares._compute(first, exchange)
    while shares.compilation.next_piece is not None:
        shares.compile_piece()
    asked = exchange.calls
    torch.compiler.reset()  # it is gone
    assert torch.equal(shares._compute(first, exchange), expected)
    assert exchange.calls == 2 * asked  # once, as the other ranks
    assert shares.compilation.state == "compiling"


def test_shares_whose_code_is_wrong_run_eagerly() -> None:
    scene = Scene(perturbing)
    shares = CompiledShares(scene.flux, ways=2, backend=perturbing)
    first = inputs()
    expected = scene.flux.compute(first, Doubling())
    for _ in range(2):
        assert torch.equal(shares._compute(first, Doubling()), expected)
        shares.compile_piece()
    assert "double block 0 differs" in str(shares.compilation.reason)
