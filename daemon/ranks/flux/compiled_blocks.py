"""The blocks of a FLUX transformer, run eagerly, compiled, or both ways for a comparison.

Blocks of a kind share their code, so that compiling one compiles all. Whole-model compilation is
no choice: it was faster by nothing and gave wrong outputs on an H200 (torch 2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..code_cache import keep_headers
from .compilation import BLOCK_KINDS, BlockKind

# Relative difference between what a block adds to its tokens when it runs compiled, and eagerly.
# Each of some ten roundings to bf16 (2**-9 at most) that only one of the two makes counts 0.002 or
# less; a missing or wrong term counts 0.1 and more. fp32 is bound by the order of summation.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Variants of one function that torch keeps, for all transformers together: kinds × dtypes and kinds
# of layers × ways to share × _MOST_COMPILED.
_RECOMPILES = 256

Call = Callable[..., Any]


class NeedsCode(Exception):
    """The compiled code that there is does not fit these inputs."""


class Disagreement(Exception):
    """A block gives something else compiled than it gives eagerly."""


class CannotJudge(Exception):
    """The eager output is not finite, so there is nothing to compare with."""


class CompiledBlocks:
    """Switches how a model's blocks run; they are eager outside of its contexts.

    ``backend`` is one of torch.compile's.
    """

    def __init__(
        self, model: Any, backend: str | Call = "inductor", *, branched: bool = False
    ) -> None:
        """``model`` is a FluxTransformer2DModel on its device.

        ``branched``: whether its layers are those of :mod:`.branches` whenever it runs.
        """
        self._branched = branched
        self._blocks: dict[BlockKind, list[nn.Module]] = {
            "double": list(model.transformer_blocks),
            "single": list(model.single_transformer_blocks),
        }
        self._backend = backend
        self._calls: dict[BlockKind, list[Call]] = {}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """All blocks run compiled. Within it a forward raises NeedsCode rather than compile."""
        with _no_new_code(), self._calling({kind: self._compiled(kind) for kind in BLOCK_KINDS}):
            yield

    @contextmanager
    def compared(self, *, compiling: BlockKind | None = None) -> Iterator[None]:
        """Blocks run both ways, and go on with what they gave eagerly.

        All kinds with the code that there is, or with ``compiling`` that kind alone, compiled now
        if need be. Raises NeedsCode from within, Disagreement and CannotJudge at the end.
        """
        found: list[Tensor] = []
        kinds = BLOCK_KINDS if compiling is None else (compiling,)
        calls = {
            kind: [
                _both_ways(block, call, found)
                for block, call in zip(self._blocks[kind], self._compiled(kind), strict=True)
            ]
            for kind in kinds
        }
        with _no_new_code() if compiling is None else _new_code(), self._calling(calls):
            yield
        names = [f"{kind} block {n}" for kind in kinds for n in range(len(self._blocks[kind]))]
        _judge(names, torch.stack(found).tolist())

    def _compiled(self, kind: BlockKind) -> list[Call]:
        if kind not in self._calls:
            if self._backend == "inductor":
                keep_headers()
            self._calls[kind] = [
                _with_equal_layouts(self._compile(block), joined=kind == "single" and not number)
                for number, block in enumerate(self._blocks[kind])
            ]
        return self._calls[kind]

    def _compile(self, block: nn.Module) -> Call:
        # torch finds code by function, and may not look at what classes layers have.
        call = MethodType(_call_branched, block) if self._branched else block._call_impl
        compiled: Call = torch.compile(call, fullgraph=True, dynamic=True, backend=self._backend)
        return compiled

    @contextmanager
    def _calling(self, calls: dict[BlockKind, list[Call]]) -> Iterator[None]:
        """What ``nn.Module.__call__`` takes instead of its own, as ``nn.Module.compile`` does."""
        blocks = [block for kind in calls for block in self._blocks[kind]]
        try:
            for block, call in zip(blocks, (c for of in calls.values() for c in of), strict=True):
                block._compiled_call_impl = call
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def _call_branched(block: Any, **given: Any) -> Any:
    return block._call_impl(**given)


@contextmanager
def _new_code() -> Iterator[None]:
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as symbols

    # Sizes that happen to be equal (3072 tokens, 3072 wide) are not equal for ever.
    with (
        symbols.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        dynamo.patch(recompile_limit=_RECOMPILES),
    ):
        yield


@contextmanager
def _no_new_code() -> Iterator[None]:
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise NeedsCode(str(error)) from None


def _with_equal_layouts(call: Call, *, joined: bool) -> Call:
    """What a block is given looks the same for all blocks of a kind, compiled before it or not.

    Strides, and what a tensor is a view of, are part of what code is compiled for; there would be
    several variants, and others in a comparison than afterwards. All single blocks but the first
    are given two pieces of one tensor: ``joined`` is for the first.
    """

    def run(*, hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any) -> Any:
        if joined:
            text = encoder_hidden_states.shape[1]
            tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            encoder_hidden_states, hidden_states = tokens[:, :text], tokens[:, text:]
        return call(
            hidden_states=hidden_states.detach(),  # no view of anything
            encoder_hidden_states=encoder_hidden_states.detach(),
            **others,
        )

    return run


def _both_ways(block: nn.Module, compiled: Call, found: list[Tensor]) -> Call:
    eager: Call = block._call_impl

    def run(**given: Any) -> Any:
        expected = eager(**given)
        streams = zip(
            (given["encoder_hidden_states"], given["hidden_states"]),
            expected,
            compiled(**given),
            strict=True,
        )
        found.append(torch.stack([_measure(*stream) for stream in streams]))
        return expected

    return run


def _measure(before: Tensor, expected: Tensor, given: Tensor) -> Tensor:
    """[3]: the difference, what of it is allowed, and 1 if the expectation is finite.

    Norms over all tokens. Each element may differ by one step of its dtype, because the sum with
    what came in is rounded; only what exceeds that counts.
    """
    step = torch.finfo(expected.dtype).eps * expected.float().abs()
    excess = ((given.float() - expected.float()).abs() - step).clamp(min=0).norm()
    allowed = _BOUNDS[expected.dtype] * (expected.float() - before.float()).norm()
    return torch.stack([excess, allowed, expected.isfinite().all().float()])


def _judge(names: list[str], found: list[list[list[float]]]) -> None:
    if not all(finite for streams in found for _, _, finite in streams):
        raise CannotJudge("the eager output is not finite")
    for name, streams in zip(names, found, strict=True):
        for excess, allowed, _ in streams:
            if not excess <= allowed:  # also when it is NaN
                raise Disagreement(
                    f"{name} differs by {excess:.3g} from its eager output, "
                    f"{allowed:.3g} is allowed"
                )
