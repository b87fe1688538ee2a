"""Forwards of a resident transformer by compiled blocks, as soon as that is proven to be the same.

Everything here is one rank's own affair: nothing is exchanged while a piece is compiled or
compared. LoRA branches are not compiled, see `branches`; forwards with them are compiled apart from
those without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import OutOfMemoryError, Tensor

from ..parallel.attention import Exchange, LocalExchange
from ..parallel.config import ParallelConfig
from ..parallel.contexts import ParallelContext
from ..parallel.opaque_exchange import OpaqueExchange, exchanging
from ..parallel.transformer import FluxInputs, ParallelFlux
from .adapters import LoraStack, applied
from .compilation import Compilation, Sizes
from .compiled_blocks import Call, CannotJudge, CompiledBlocks, Disagreement, NeedsCode
from .recording import kind_of
from .recordings import Recordable, Recordings

_LONGEST_REASON = 200


@dataclass(frozen=True)
class Asked:
    """What a forward is asked for with, besides its inputs."""

    config: ParallelConfig
    stack: LoraStack | None = None
    nbytes: int = 0  # of activations, at most
    reserve: Callable[[], None] = lambda: None  # to be called before anything is computed


class _Seen(NamedTuple):
    """A forward that was."""

    inputs: FluxInputs
    stack: LoraStack | None


class CompiledForward:
    """Around one transformer in one dtype, for ranks that have all tokens of their rows.

    ``refusal`` says why it must not be compiled. Forwards come all with a LoRA stack, if they are
    ``branched``, or all without, and within `applied`.
    """

    _alone: Exchange | None = None  # what blocks attend by while a rank tries them

    def __init__(
        self,
        flux: ParallelFlux,
        *,
        branched: bool = False,
        refusal: str | None = None,
        backend: str | Call = "inductor",
    ) -> None:
        self.compilation = Compilation()
        if refusal is not None:
            self.compilation.refuse(refusal)
        self._flux = flux
        self._blocks = CompiledBlocks(flux.model, backend, branched=branched)
        self._seen: _Seen | None = None  # to compile with

    @property
    def recorded(self) -> int:
        """How many kinds of forwards are recorded."""
        return 0

    def forward(
        self,
        context: ParallelContext,
        inputs: FluxInputs,
        stack: LoraStack | None = None,
        nbytes: int = 0,
        reserve: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """As :meth:`ParallelFlux.forward`.

        ``nbytes``: of activations, at most; ``reserve`` is called, by all ranks or by none, unless
        they are there already.
        """
        asked = Asked(context.config, stack, nbytes, reserve)
        return self._flux.forward(context, inputs, partial(self._serve, asked))

    def forget_stack(self) -> None:
        """Hold nothing of a LoRA: what waits to be compiled with one waits for another forward."""
        if self._seen is not None and self._seen.stack is not None:
            self.compilation.put_off()
            self._seen = None

    def compile_piece(self) -> None:
        """Compile one kind of block with the inputs of a forward that was, if that is wanted.

        Takes seconds to a minute. Whatever goes wrong, forwards stay as they were.
        """
        kind, seen = self.compilation.next_piece, self._seen
        if kind is None or seen is None:
            return
        try:
            with applied(self._flux.model, seen.stack), self._blocks.compared(compiling=kind):
                self._flux.compute(seen.inputs, self._alone)
        except (CannotJudge, OutOfMemoryError):
            self.compilation.put_off()
        except Exception as error:  # noqa: BLE001  of the compiler, or Disagreement
            self._refuse(error)
        else:
            self.compilation.piece_agreed()
        if self.compilation.next_piece is None:
            self._seen = None

    def _refuse(self, error: Exception) -> None:
        self.compilation.refuse(_explain(error))
        self._seen = None

    def _serve(self, asked: Asked, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        asked.reserve()
        return self._compute(rows, exchange, asked.stack)

    def _run_compiled(self, rows: FluxInputs) -> Tensor:
        with self._blocks.compiled():
            return self._flux.compute(rows, self._alone)

    def _compute(
        self, rows: FluxInputs, exchange: Exchange | None, stack: LoraStack | None = None
    ) -> Tensor:
        sizes = sizes_of(rows, stack)
        match self.compilation.choose(sizes):
            case "compiled":
                output = self._try_compiled(sizes, rows)
            case "compared":
                output = self._try_compared(sizes, rows)
            case _:
                output = None
        return self._compute_eagerly(sizes, _Seen(rows, stack), None) if output is None else output

    def _compute_eagerly(self, sizes: Sizes, seen: _Seen, exchange: Exchange | None) -> Tensor:
        output = self._flux.compute(seen.inputs, exchange)
        if self.compilation.want(sizes):
            self._seen = seen
        return output

    def _try_compiled(self, sizes: Sizes, rows: FluxInputs) -> Tensor | None:
        try:
            return self._run_compiled(rows)
        except OutOfMemoryError:
            raise
        except NeedsCode:
            self.compilation.leave_uncovered(sizes)
        except Exception as error:  # noqa: BLE001  what eager forwards raise, they raise again
            self._refuse(error)
        return None

    def _try_compared(self, sizes: Sizes, rows: FluxInputs) -> Tensor | None:
        try:
            with self._blocks.compared():
                output = self._flux.compute(rows, self._alone)
        except NeedsCode:
            self.compilation.leave_uncovered(sizes)
        except (CannotJudge, OutOfMemoryError):
            pass  # both ways take a little more room than one
        except Exception as error:  # noqa: BLE001  as above
            self._refuse(error)
        else:
            self.compilation.agree(sizes)
            return output
        return None


class CompiledShares(CompiledForward):
    """The same for ranks that share the tokens of their rows.

    A rank compiles, and compares, with its own share as if there were nothing else. What travels
    between ranks is the same from compiled blocks and from eager ones, so each rank goes over when
    it is ready. What runs compiled on all of them is recorded, if there are ``recordings``.
    """

    def __init__(
        self,
        flux: ParallelFlux,
        *,
        ways: int,
        branched: bool = False,
        refusal: str | None = None,
        backend: str | Call = "inductor",
        recordings: Recordings | None = None,
    ) -> None:
        """``ways``: the ulysses degree of the contexts that come."""
        super().__init__(flux, branched=branched, refusal=refusal, backend=backend)
        self._alone = OpaqueExchange(ways)
        self._recordings = recordings
        self._owner = object()  # of its recordings, which must not keep the weights alive

    @property
    def recorded(self) -> int:
        """See `CompiledForward.recorded`."""
        return 0 if self._recordings is None else self._recordings.number(self._owner)

    def _serve(self, asked: Asked, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        if self._recordings is None:
            return super()._serve(asked, rows, exchange)
        stack = asked.stack
        key = (self._owner, asked.config, kind_of(rows), None if stack is None else stack.identity)
        if (output := self._recordings.replay(key, rows)) is not None:
            return output
        asked.reserve()
        sizes = sizes_of(rows, stack)
        planned = self.compilation.choose(sizes)
        output = self._compute(rows, exchange, stack)
        compiled = planned == "compiled" == self.compilation.choose(sizes)
        make = partial(self._recordable, asked, rows, exchange, output)
        trusted = self.compilation.reason is None
        self._recordings.offer(key, make if compiled else lambda: None, trusted=trusted)
        return output

    def _recordable(
        self, asked: Asked, rows: FluxInputs, exchange: Exchange | None, output: Tensor
    ) -> Recordable | None:
        by_heads = None if exchange is None else exchange.by_heads
        if exchange is None or by_heads is None:
            return None  # what xfuser does is not recorded

        def compute(rows: FluxInputs) -> Tensor:
            try:
                with exchanging(exchange):
                    return self._run_compiled(rows)
            except Exception:
                with suppress(Exception):  # of CUDA, because of the first one
                    by_heads.give_up()  # no recording can end before
                raise

        return Recordable(rows, output, compute, self._flux.rotations, asked.nbytes, asked.stack)

    def _compute(
        self, rows: FluxInputs, exchange: Exchange | None, stack: LoraStack | None = None
    ) -> Tensor:
        exchange = exchange or LocalExchange()
        sizes = sizes_of(rows, stack)
        if self.compilation.choose(sizes) == "compared":
            self._try_compared(sizes, rows)
        if self.compilation.choose(sizes) == "compiled":
            with exchanging(exchange) as use:
                try:
                    return self._run_compiled(rows)
                except NeedsCode:
                    if use.count:  # the others would wait for what comes a second time
                        raise
                    self.compilation.leave_uncovered(sizes)
        return self._compute_eagerly(sizes, _Seen(rows, stack), exchange)


def sizes_of(rows: FluxInputs, stack: LoraStack | None) -> Sizes:
    """What code may depend on."""
    count, image, _ = rows.hidden_states.shape
    text = rows.encoder_hidden_states.shape[1]
    return Sizes(count, image, text, frozenset() if stack is None else stack.modules)


def _explain(error: Exception) -> str:
    if isinstance(error, Disagreement):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch says in the first line which part failed, and in the second why.
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_LONGEST_REASON]
