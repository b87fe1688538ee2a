"""Forwards of a resident transformer by compiled blocks, as soon as that is proven to be the same.

Everything here is one rank's own affair: nothing is exchanged while a piece is compiled or
compared. Forwards with LoRA branches do not come here; they run eagerly.
"""

from __future__ import annotations

from functools import partial

from torch import OutOfMemoryError, Tensor

from ..parallel.attention import Exchange, LocalExchange
from ..parallel.config import ParallelConfig
from ..parallel.contexts import ParallelContext
from ..parallel.opaque_exchange import OpaqueExchange, exchanging
from ..parallel.transformer import FluxInputs, ParallelFlux
from .compilation import Compilation, Sizes
from .compiled_blocks import Call, CannotJudge, CompiledBlocks, Disagreement, NeedsCode
from .recording import kind_of
from .recordings import Recordable, Recordings

_LONGEST_REASON = 200


class CompiledForward:
    """Around one transformer in one dtype, for ranks that have all tokens of their rows.

    ``refusal`` says why it must not be compiled. What runs compiled is recorded, if there are
    ``recordings``.
    """

    _alone: Exchange | None = None  # what blocks attend by while a rank tries them

    def __init__(
        self,
        flux: ParallelFlux,
        *,
        refusal: str | None = None,
        backend: str | Call = "inductor",
        recordings: Recordings | None = None,
    ) -> None:
        self.compilation = Compilation()
        self.owner = object()  # of its recordings, which must not keep the weights alive
        self._recordings = recordings
        if refusal is not None:
            self.compilation.refuse(refusal)
        self._flux = flux
        self._blocks = CompiledBlocks(flux.model, backend)
        self._inputs: FluxInputs | None = None  # of a real forward, to compile with

    def forward(self, context: ParallelContext, inputs: FluxInputs, nbytes: int = 0) -> Tensor:
        """As :meth:`ParallelFlux.forward`. ``nbytes``: of activations, at most."""
        serve = partial(self._serve, context.config, nbytes)
        return self._flux.forward(context, inputs, serve)

    def compile_piece(self) -> None:
        """Compile one kind of block with the inputs of a forward that was, if that is wanted.

        Takes seconds to a minute. Whatever goes wrong, forwards stay as they were.
        """
        kind, inputs = self.compilation.next_piece, self._inputs
        if kind is None or inputs is None:
            return
        try:
            with self._blocks.compared(compiling=kind):
                self._flux.compute(inputs, self._alone)
        except (CannotJudge, OutOfMemoryError):
            self.compilation.put_off()
        except Exception as error:  # noqa: BLE001  of the compiler, or Disagreement
            self.compilation.refuse(_explain(error))
        else:
            self.compilation.piece_agreed()
        if self.compilation.next_piece is None:
            self._inputs = None

    def _serve(
        self, config: ParallelConfig, nbytes: int, rows: FluxInputs, exchange: Exchange | None
    ) -> Tensor:
        if self._recordings is None:
            return self._compute(rows, exchange)
        key = (self.owner, config, kind_of(rows))
        if (output := self._recordings.replay(key, rows)) is not None:
            return output
        sizes = sizes_of(rows)
        planned = self.compilation.choose(sizes)
        output = self._compute(rows, exchange)
        compiled = planned == "compiled" == self.compilation.choose(sizes)
        offered = partial(self._recordable, rows, exchange, output, nbytes)
        self._recordings.offer(key, offered if compiled else lambda: None)
        return output

    def _recordable(
        self, rows: FluxInputs, exchange: Exchange | None, output: Tensor, nbytes: int
    ) -> Recordable | None:
        if exchange is not None and exchange.by_heads is None:
            return None  # what xfuser does is not recorded
        compute = partial(self._run_compiled, exchange=exchange)
        return Recordable(rows, output, compute, self._flux.rotations, nbytes)

    def _run_compiled(self, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        with exchanging(exchange or LocalExchange()), self._blocks.compiled():
            return self._flux.compute(rows, self._alone)

    def _compute(self, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        sizes = sizes_of(rows)
        match self.compilation.choose(sizes):
            case "compiled":
                output = self._try_compiled(sizes, rows)
            case "compared":
                output = self._try_compared(sizes, rows)
            case _:
                output = None
        return self._compute_eagerly(sizes, rows, None) if output is None else output

    def _compute_eagerly(self, sizes: Sizes, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        output = self._flux.compute(rows, exchange)
        if self.compilation.want(sizes):
            self._inputs = rows
        return output

    def _try_compiled(self, sizes: Sizes, rows: FluxInputs) -> Tensor | None:
        try:
            return self._run_compiled(rows, None)
        except OutOfMemoryError:
            raise
        except NeedsCode:
            self.compilation.leave_uncovered(sizes)
        except Exception as error:  # noqa: BLE001  what eager forwards raise, they raise again
            self.compilation.refuse(_explain(error))
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
            self.compilation.refuse(_explain(error))
        else:
            self.compilation.agree(sizes)
            return output
        return None


class CompiledShares(CompiledForward):
    """The same for ranks that share the tokens of their rows.

    A rank compiles, and compares, with its own share as if there were nothing else. What travels
    between ranks is the same from compiled blocks and from eager ones, so each rank goes over when
    it is ready.
    """

    def __init__(
        self,
        flux: ParallelFlux,
        *,
        ways: int,
        refusal: str | None = None,
        backend: str | Call = "inductor",
        recordings: Recordings | None = None,
    ) -> None:
        """``ways``: the ulysses degree of the contexts that come."""
        super().__init__(flux, refusal=refusal, backend=backend, recordings=recordings)
        self._alone = OpaqueExchange(ways)

    def _compute(self, rows: FluxInputs, exchange: Exchange | None) -> Tensor:
        exchange = exchange or LocalExchange()
        sizes = sizes_of(rows)
        if self.compilation.choose(sizes) == "compared":
            self._try_compared(sizes, rows)
        if self.compilation.choose(sizes) == "compiled":
            with exchanging(exchange) as use:
                try:
                    with self._blocks.compiled():
                        return self._flux.compute(rows, self._alone)
                except NeedsCode:
                    if use.count:  # the others would wait for what comes a second time
                        raise
                    self.compilation.leave_uncovered(sizes)
        return self._compute_eagerly(sizes, rows, exchange)


def sizes_of(rows: FluxInputs) -> Sizes:
    """What code may depend on."""
    count, image, _ = rows.hidden_states.shape
    return Sizes(count, image, rows.encoder_hidden_states.shape[1])


def _explain(error: Exception) -> str:
    if isinstance(error, Disagreement):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch says in the first line which part failed, and in the second why.
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_LONGEST_REASON]
