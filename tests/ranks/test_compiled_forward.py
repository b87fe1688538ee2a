"""Compiled forwards give what eager ones give, or are not used; by compilers that are quick."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import flux_files
import pytest
import torch
from ranks.compiled_scene import WEIGHTS, Scene, inputs, stack_of
from torch import Tensor, fx
from xdit_sidecar.daemon.ranks.flux.adapters import applied
from xdit_sidecar.daemon.ranks.flux.compiled_forward import CompiledForward, CompiledShares
from xdit_sidecar.daemon.ranks.parallel.attention import Exchange, LocalExchange

pytestmark = [
    pytest.mark.allow_leaks("torch's compiler keeps what it opened for the process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in xfuser and its own
]


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


# The second moves changes in place out of what it compiles, and back, as inductor does.
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_branches_share_code(backend: str) -> None:
    scene = Scene(backend, branched=True)
    first, one = inputs(), stack_of(1)
    plain = scene.flux.compute(first)
    with applied(scene.flux.model, one):
        expected = scene.flux.compute(first)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(scene.compute(first, one), expected)
    scene.compile()
    assert (scene.state, scene.graphs) == ("compiled", 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(scene.compute(first, one), expected)
    # Other ranks, other layers, several LoRAs, another size: the same code.
    for stack in (one, stack_of(2, 3), stack_of(4, only="single_blocks.1."), stack_of()):
        for given in (first, inputs(16, 12, 7)):
            with applied(scene.flux.model, stack):
                expected = scene.flux.compute(given)
            for _ in range(2):  # compared, then compiled
                assert torch.equal(scene.compute(given, stack), expected)
    assert (scene.state, scene.graphs) == ("compiled", 2)
    assert torch.equal(scene.flux.compute(first), plain)


def test_code_with_branches_and_without_are_apart() -> None:
    scene = Scene("eager")
    branched = CompiledForward(scene.flux, branched=True, backend="eager")
    first, stack = inputs(), stack_of(1)
    plain = scene.flux.compute(first)
    for forward, loras in ((scene.forward, None), (branched, stack)):
        scene.compute(first, loras, forward)
        scene.compile(forward)
        assert forward.compilation.state == "compiled"
    assert scene.graphs == 4
    for _ in range(2):
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(scene.compute(first), plain)
            found = scene.compute(first, stack, branched)
        with applied(scene.flux.model, stack):
            assert torch.equal(found, scene.flux.compute(first))


def test_what_waits_to_be_compiled_keeps_no_lora_alive() -> None:
    scene = Scene("eager", branched=True)
    stack = stack_of(1)
    scene.compute(inputs(), stack)
    assert scene.state == "compiling"
    alive = weakref.ref(stack)
    scene.forward.forget_stack()
    del stack
    assert (scene.state, alive()) == ("eager", None)


def test_what_is_refused_keeps_no_lora_alive() -> None:
    scene = Scene(perturbing, branched=True)
    stack = stack_of(1)
    scene.compute(inputs(), stack)
    alive = weakref.ref(stack)
    del stack
    assert alive() is not None
    scene.compile()
    assert (scene.state, alive()) == ("refused", None)


def test_branches_beside_layers_that_cast_at_use_and_an_exchange() -> None:
    weights = flux_files.store(WEIGHTS, "F8_E4M3", scales="scaled_fp8")
    scene = Scene("aot_eager", weights=weights, dtype=torch.bfloat16)
    shares = CompiledShares(scene.flux, ways=2, branched=True, backend="aot_eager")
    first = inputs(dtype=torch.bfloat16)
    stacks = [stack_of(seed, dtype=torch.bfloat16) for seed in (1, 2)]
    for number, stack in enumerate(stacks):
        with applied(scene.flux.model, stack), torch.no_grad():
            expected = scene.flux.compute(first, Doubling())
            for _ in range(2):
                assert torch.equal(shares._compute(first, Doubling(), stack), expected)
                if not number:
                    scene.compile(shares)
    assert (shares.compilation.state, scene.graphs) == ("compiled", 2)


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
    scene.compile(shares)
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
    scene.compile(shares)
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
