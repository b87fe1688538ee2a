"""Which forwards of a transformer may run compiled, and what is compiled next. Pure.

A forward's sizes are used compiled once every block gave, compiled, what it gives eagerly for one
forward of these sizes. Code is compiled in pieces, one kind of block each, between jobs.

==========  ==========================  ==================================================
state       leaves it                   to
==========  ==========================  ==================================================
eager       a forward                   compiling: what is missing waits for an idle moment
compiling   the last piece agreed       compiled
compiling   a piece could not be judged eager: asked for again by the next forward
compiled    a forward of other sizes    compiled, when it agreed; compiling, if it needs new code
any         disagreement, an exception  refused, for good
==========  ==========================  ==================================================
"""

from __future__ import annotations

from typing import Literal, NamedTuple

BlockKind = Literal["double", "single"]
BLOCK_KINDS: tuple[BlockKind, ...] = ("double", "single")

_MOST_SIZES = 256  # that are remembered to agree
_MOST_COMPILED = 4  # times that each kind is compiled: one row, several, and what surprises


class Sizes(NamedTuple):
    """What differs between the blocks' inputs from forward to forward."""

    rows: int
    image_tokens: int
    text_tokens: int
    branched: frozenset[str] = frozenset()  # layers that LoRAs add to


class Compilation:
    """Of one transformer in one dtype, on one rank."""

    def __init__(self) -> None:
        self.reason: str | None = None  # why it is refused
        self._agreed: dict[Sizes, None] = {}
        self._uncovered: set[Sizes] = set()  # the code that there is does not fit them
        self._wanted: Sizes | None = None
        self._left: list[BlockKind] = []  # pieces of what is wanted
        self._compiled = 0

    @property
    def state(self) -> Literal["eager", "compiling", "compiled", "refused"]:
        """See the module."""
        if self.reason is not None:
            return "refused"
        if self._wanted is not None:
            return "compiling"
        return "compiled" if self._agreed else "eager"

    def choose(self, sizes: Sizes) -> Literal["eager", "compared", "compiled"]:
        """How a forward is to run; "compared" runs both ways and is answered with the eager one."""
        if self.reason is not None:
            return "eager"
        if sizes in self._agreed:
            return "compiled"
        return "compared" if self._compiled and sizes not in self._uncovered else "eager"

    def want(self, sizes: Sizes) -> bool:
        """A forward ran eagerly: whether its inputs are to be kept, to compile with them."""
        if self.reason is not None or self._wanted is not None:
            return False
        if sizes in self._agreed or self._compiled >= _MOST_COMPILED:
            return False
        self._wanted, self._left = sizes, list(BLOCK_KINDS)
        return True

    @property
    def next_piece(self) -> BlockKind | None:
        """What is to be compiled in the next idle moment."""
        return self._left[0] if self._left and self.reason is None else None

    def piece_agreed(self) -> None:
        """The next piece is compiled, and gives what it gives eagerly."""
        self._left.pop(0)
        if not self._left and self._wanted is not None:
            self._compiled += 1
            self._uncovered.discard(self._wanted)
            self.agree(self._wanted)
            self._wanted = None

    def put_off(self) -> None:
        """The next piece could not be done with these inputs."""
        self._wanted, self._left = None, []

    def agree(self, sizes: Sizes) -> None:
        """A forward of these sizes gave the same both ways."""
        if len(self._agreed) >= _MOST_SIZES:
            self._agreed.pop(next(iter(self._agreed)))
        self._agreed[sizes] = None

    def leave_uncovered(self, sizes: Sizes) -> None:
        """The code that there is does not fit these sizes."""
        self._agreed.pop(sizes, None)
        self._uncovered.add(sizes)

    def refuse(self, reason: str) -> None:
        """Nothing runs compiled from now on."""
        self.reason = reason
        self.put_off()
