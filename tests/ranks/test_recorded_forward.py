"""What is recorded gives what the forward gives, is bounded, and is not used where it does not.

On a GPU by CUDA graphs, elsewhere by graphs that call what they were given again.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch
from ranks.called_again import CalledAgain
from ranks.compiled_scene import Scene, inputs, stack_of
from torch import Tensor
from xdit_sidecar.daemon.ranks.flux import recordings as module
from xdit_sidecar.daemon.ranks.flux.adapters import LoraStack, applied
from xdit_sidecar.daemon.ranks.flux.compiled_forward import Asked, CompiledShares
from xdit_sidecar.daemon.ranks.flux.recording import CudaGraph, Graph
from xdit_sidecar.daemon.ranks.flux.recordings import Recordings
from xdit_sidecar.daemon.ranks.parallel.attention import LocalExchange, SequenceExchange
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.process_group import RankGroup
from xdit_sidecar.daemon.ranks.parallel.splits import TokenSplit
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs
from xdit_sidecar.daemon.ranks.parallel.ulysses import HeadExchange
from xdit_sidecar.daemon.ranks.reservation import Reservation

pytestmark = [
    pytest.mark.allow_leaks("torch's compiler keeps what it opened for the process"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in xfuser and its own
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL = CudaGraph if DEVICE == "cuda" else CalledAgain


@dataclass
class Counted:
    """Makes graphs, and remembers how many and how often they were used."""

    made: int = 0
    replays: int = 0
    kind: Callable[[], Graph] = REAL
    wrong: float = 0.0
    failing: type[Exception] | None = None  # at the end of what is recorded

    def __call__(self) -> Graph:
        self.made += 1
        return _CountedGraph(self, self.kind())


@dataclass
class _CountedGraph:
    graphs: Counted
    graph: Graph
    result: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def nbytes(self) -> int:
        return self.graph.nbytes

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        def fail() -> Tensor:
            work()
            assert self.graphs.failing is not None
            raise self.graphs.failing("no graph here\nand more")

        self.result = self.graph.record(fail if self.graphs.failing else work)
        return self.result

    def replay(self) -> None:
        self.graphs.replays += 1
        self.graph.replay()
        if self.graphs.wrong:
            self.result.add_(self.graphs.wrong)


class Group(RankGroup):
    """One rank, which is told what another one says."""

    answers: list[int]

    def most(self, number: int) -> int:
        return max(number, self.answers.pop(0)) if self.answers else number


_SCENES: list[RecordingScene] = []


class HeadsOfOne(HeadExchange):
    """The exchange of a rank that is alone."""

    def _send(self, packed: Tensor) -> Tensor:
        return packed.clone()


class AloneByHeads(SequenceExchange):
    """What is recorded: an exchange by heads."""

    by_heads = HeadsOfOne(None, LocalExchange().attend)


def make_no_heads() -> HeadExchange:
    """They are there."""
    raise NotImplementedError


class RecordingScene(Scene):
    """A compiled transformer with recordings."""

    exchange = AloneByHeads(TokenSplit(9, 1, 0), TokenSplit(30, 1, 0), 1, make_no_heads)

    def __init__(self, stack: LoraStack | None = None) -> None:
        """``stack``: of the first forward. No other scene has code afterwards."""
        _SCENES.clear()
        self.group = Group(0, 1, torch.device(DEVICE), "gloo", 10.0)
        super().__init__("eager", DEVICE)
        branched = stack is not None
        self.forward = self.shares = CompiledShares(
            self.flux, ways=1, branched=branched, backend="eager"
        )
        self.compute(given(), stack)
        self.compile()
        assert self.state == "compiled"

    def record(self, graphs: Counted, reserve: int = 0) -> RecordingScene:
        """Begin anew, by these graphs, with the first forward of its kind."""
        self.group.__dict__["answers"] = []
        self.graphs_of = graphs
        self.reservation = Reservation(self.group, reserve=reserve, neighbours=1)
        self.recordings = Recordings(self.group, self.reservation, graphs)
        self.shares._recordings = self.recordings
        self.compute(given())
        return self

    def asked(self, stack: LoraStack | None) -> Asked:
        return Asked(ParallelConfig(), stack, reserve=self.reserve)

    def reserve(self) -> None:
        """Before anything is computed."""

    def expect(self, *arguments: int, seed: int = 1, stack: LoraStack | None = None) -> None:
        """A forward gives what the transformer gives eagerly."""
        self.expect_of(given(*arguments, seed=seed), stack)

    def expect_of(self, asked: FluxInputs, stack: LoraStack | None = None) -> None:
        with torch.no_grad(), applied(self.flux.model, stack):
            expected = self.flux.compute(asked)
        assert torch.equal(self.compute(asked, stack), expected)

    @property
    def number(self) -> int:
        return self.shares.recorded


@pytest.fixture
def compiled() -> RecordingScene:
    """One for as many tests as need no other."""
    if not _SCENES:
        _SCENES[:] = [RecordingScene()]
    return _SCENES[0]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are made at the second time, and tried again at the fourth."""
    monkeypatch.setattr(module, "_FIRST", 2)


def given(*arguments: int, seed: int = 1):  # type: ignore[no-untyped-def]
    return inputs(*arguments, device=DEVICE, seed=seed)


def test_the_second_forward_of_a_kind_is_recorded(compiled: RecordingScene) -> None:
    graphs = Counted()
    scene = compiled.record(graphs)
    assert scene.number == 0
    scene.expect()  # the second: the first one was before there was code
    assert (scene.number, graphs.made, graphs.replays) == (1, 1, 1)  # compared once
    for seed in range(3):
        scene.expect(seed=seed)
    assert (graphs.made, graphs.replays) == (1, 4)
    # As many tokens, placed otherwise: the same recording, told of other positions.
    scene.expect(10, 12)
    assert (graphs.made, graphs.replays) == (1, 5)


def test_short_runs_go_without(compiled: RecordingScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    graphs = Counted()
    scene = compiled.record(graphs)
    for _ in range(4):
        scene.expect()
    assert graphs.made == 0
    # What is forgotten, after some time without work, is counted anew.
    scene.recordings.forget()
    for _ in range(5):
        scene.expect()
    assert graphs.made == 0
    scene.expect()
    assert (graphs.made, scene.number) == (1, 1)


def test_what_was_compared_is_not_recorded(compiled: RecordingScene) -> None:
    graphs = Counted()
    scene = compiled.record(graphs)
    scene.expect(16, 12, 7)  # compared with eager blocks
    assert graphs.made == 0
    scene.expect(16, 12, 7)
    assert (graphs.made, scene.number) == (1, 1)


def test_kinds_are_told_apart(compiled: RecordingScene) -> None:
    graphs = Counted()
    scene = compiled.record(graphs)
    scene.expect()
    scene.expect_of(replace(given(), timestep=torch.tensor([0.5], device=DEVICE)))
    assert graphs.replays == 2  # another value, the same kind
    for text in (5, 6, 5, 6, 5, 6):
        scene.expect(12, 10, text)
    assert scene.number == 3
    replays = graphs.replays
    doubled = replace(given(), timestep=torch.tensor([0.5], device=DEVICE, dtype=torch.float64))
    scene.expect_of(doubled)  # another dtype, another kind
    assert graphs.replays == replays


def test_what_is_given_and_taken_stays_as_it_is(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted())
    offered = given()
    kept = replace(offered, **{name: tensor.clone() for name, tensor in tensors_of(offered)})
    scene.expect_of(offered)
    assert scene.number == 1
    taken = scene.compute(offered)
    copy = taken.clone()
    scene.expect(10, 12, seed=2)  # replayed, with other values and at other positions
    assert torch.equal(taken, copy)
    for (name, now), (_, then) in zip(tensors_of(offered), tensors_of(kept), strict=True):
        assert torch.equal(now, then), name
    scene.expect_of(offered)  # the tables of its positions as well


def tensors_of(asked: FluxInputs) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in vars(asked).items() if tensor is not None]


def test_each_lora_has_a_recording() -> None:
    one, other = (stack_of(seed, device=DEVICE) for seed in (1, 2))
    graphs = Counted()
    scene = RecordingScene(one).record(graphs)
    for _ in range(4):
        for stack in (one, other):  # compared, then compiled
            scene.expect(stack=stack)
    assert (scene.number, graphs.made) == (2, 2)
    assert graphs.replays >= 4  # compared, and once more
    # Only the recording keeps what it reads.
    alive = weakref.ref(one)
    del one, stack
    gc.collect()
    assert alive() is not None
    scene.recordings.forget()
    gc.collect()
    assert alive() is None
    scene.expect(stack=other)


def test_replays_ask_for_no_memory(
    compiled: RecordingScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = compiled.record(Counted())
    asked = []

    def reserve() -> None:
        asked.append(scene.number)
        scene.reservation.check(1000, "a test")

    monkeypatch.setattr(scene, "reserve", reserve)
    scene.expect()
    assert (scene.number, asked) == (1, [0])
    scene.expect()
    assert asked == [0]
    # What fitted was given back for the recording, and no replay has taken it again.
    assert scene.reservation._fitted == 0
    scene.expect(12, 10, 4)
    assert (asked, scene.reservation._fitted) == ([0, 1], 1000)


def test_the_oldest_go(compiled: RecordingScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    graphs = Counted()
    scene = compiled.record(graphs)
    for text in (4, 5, 6):
        for _ in range(2):
            scene.expect(12, 10, text)
    assert (graphs.made, scene.number) == (3, 2)
    before = graphs.replays
    scene.expect(12, 10, 5)
    assert graphs.replays == before + 1
    scene.expect(12, 10, 4)  # the third time: not yet again
    assert (graphs.made, graphs.replays) == (3, before + 1)
    scene.expect(12, 10, 4)
    assert (graphs.made, scene.number) == (4, 2)
    # What a recording holds is taken from the memory that there is, until it is gone.
    held = [recorded.nbytes for recorded in scene.recordings._kept.values()]
    assert scene.reservation._withheld == sum(held)
    scene.recordings.forget()
    assert (scene.number, scene.reservation._withheld) == (0, 0)
    scene.expect()


def test_wrong_recordings_are_refused(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted(wrong=1e-3))
    for _ in range(5):
        scene.expect()
    assert scene.number == 0
    assert "something else" in str(scene.recordings.refusal)
    assert scene.graphs_of.made == 1


def test_what_is_not_trusted_any_more_is_not_replayed() -> None:
    scene = RecordingScene().record(Counted())
    scene.expect()
    assert scene.number == 1
    scene.shares.compilation.refuse("the compiler is wrong")
    scene.expect(12, 10, 4)  # what all ranks are asked at
    assert scene.number == 0
    scene.expect()
    assert scene.number == 0


def test_what_another_rank_does_not_trust_goes(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted())
    scene.expect()
    scene.group.answers[:] = [1]
    scene.expect(12, 10, 4)
    assert (scene.number, scene.state) == (0, "compiled")


def test_a_device_that_cannot_is_not_asked_again(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted(failing=RuntimeError))
    for _ in range(5):
        scene.expect()
    assert (scene.number, scene.graphs_of.made) == (0, 1)
    assert scene.recordings.refusal == "RuntimeError: no graph here"
    if DEVICE == "cuda":  # what failed has left nothing behind
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.empty_cache()
        scene.expect()


@pytest.mark.skipif(DEVICE == "cuda", reason="stands for CUDA where there is none")
@pytest.mark.parametrize("ends", [True, False])
def test_what_fails_is_told_and_kept_by_nobody(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """Not even until garbage is collected: there is want of memory."""

    @contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            if not ends:
                raise RuntimeError("the capture cannot end")

    for name in ("synchronize", "empty_cache", "CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    activations = torch.zeros(3)
    alive = weakref.ref(activations)

    def work(activations: Tensor = activations) -> Tensor:
        raise torch.OutOfMemoryError(f"{activations.shape} is too much")

    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError, match="too much"):
            CudaGraph().record(work)
        del work, activations
        assert alive() is None
    finally:
        gc.enable()


def test_want_of_memory_is_no_reason_for_ever(compiled: RecordingScene) -> None:
    graphs = Counted(failing=torch.OutOfMemoryError)
    scene = compiled.record(graphs)
    scene.expect()
    assert (scene.number, scene.recordings.refusal) == (0, None)
    graphs.failing = None
    for _ in range(2):  # the third, and the fourth time
        scene.expect()
    assert scene.number == 1


def test_without_room_nothing_is_recorded(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted(), reserve=1 << 60)
    for _ in range(5):
        scene.expect()
    assert (scene.number, scene.graphs_of.made, scene.recordings.refusal) == (0, 0, None)


@pytest.mark.parametrize(
    ("answers", "made", "refused"),
    [
        ([1], 0, False),  # not ready
        ([0, 1], 0, False),  # no room
        ([0, 0, 1], 1, True),  # could not record
        ([0, 0, 0, 1], 1, False),  # ran out of memory
        ([0, 0, 0, 0, 0, 1], 1, True),  # has another output
    ],
)
def test_one_rank_speaks_for_all(
    compiled: RecordingScene, answers: list[int], made: int, refused: bool
) -> None:
    scene = compiled.record(Counted())
    scene.group.answers[:] = answers
    scene.expect()
    assert not scene.group.answers
    assert (scene.number, scene.graphs_of.made) == (0, made)
    assert (scene.recordings.refusal is not None) == refused


def test_recordings_keep_no_weights_alive() -> None:
    scene = (_SCENES.pop() if _SCENES else RecordingScene()).record(Counted())
    scene.expect()
    recordings, model = scene.recordings, weakref.ref(scene.flux.model)
    if DEVICE == "cpu":  # its graph calls the model
        recordings.forget()
    del scene
    torch.compiler.reset()
    gc.collect()
    assert model() is None


def test_without_graphs_every_forward_is_computed(compiled: RecordingScene) -> None:
    scene = compiled.record(Counted())
    scene.shares._recordings = Recordings(scene.group, scene.reservation, None)
    for _ in range(3):
        scene.expect()
    assert scene.number == 0
