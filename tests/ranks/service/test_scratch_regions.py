"""Latents lie in memory that a session shares with the ranks: they pass through nobody."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux_inputs import Inputs
from ranks.service.test_forward_service import send
from ranks_scene import EXACT, RanksScene, User, maps, running_ranks, some_inputs
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client import scratch as scratch_module
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.client.exchange import Exchanges
from xdit_sidecar.protocol.client.scratch import ScratchPool
from xdit_sidecar.protocol.errors import BadMessage, Busy, Cancelled, RankLost
from xdit_sidecar.protocol.tensors import pack_tensor, view_placed
from xdit_sidecar.protocol.version import PROTOCOL_VERSION, ProtocolVersion

MIB = limits.MIB


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[m.OpenScratch]:
    """The regions that clients ask for."""
    seen: list[m.OpenScratch] = []
    original = Exchanges.open

    def look(self, session, body, deadline, frames=()):  # type: ignore[no-untyped-def]
        if isinstance(body, m.OpenScratch):
            seen.append(body)
        if isinstance(body, m.Forward):
            latents = [part for part in body.tensors if part.name == "x"]
            assert all(part.inline == (body.scratch is None) for part in latents)
        return original(self, session, body, deadline, frames)

    monkeypatch.setattr(Exchanges, "open", look)
    return seen


def large(seed: int = 1) -> Inputs:
    """A latent of 64 KiB."""
    inputs = some_inputs(seed)
    assert inputs["x"].nbytes == 64 << 10
    return inputs


def open_region(user: User, number: int = 1, nbytes: int = MIB) -> mmap.mmap:
    """Our map of a region of this user's session."""
    deadline = Deadline(10.0)
    session = user.client.session(deadline)
    body = m.OpenScratch(number=number, nbytes=nbytes)
    opened = user.client.exchanges.ask(session, body, m.ScratchOpened, deadline)
    file = session.take_descriptor(opened.descriptor, deadline)
    try:
        return mmap.mmap(file, nbytes)
    finally:
        os.close(file)


def by_hand(
    user: User,
    inputs: Inputs,
    memory: mmap.mmap,
    change: Callable[[m.TensorPart], m.TensorPart] = lambda part: part,
    number: int = 1,
) -> m.AnswerBody:
    """What a forward is answered whose latent lies in a region, as ``change`` tells of it."""
    parts, frames = [], []
    for name, tensor in inputs.items():
        if name == "x":
            shape, dtype = list(tensor.shape), "F32"
            part = m.TensorPart(name=name, dtype=dtype, shape=shape, inline=False, offset=0)
            view_placed(memory, part).copy_(tensor)
            parts.append(change(part))
        else:
            part, data = pack_tensor(name, tensor)
            parts.append(part)
            frames += map(bytes, data)
    job = m.Forward(
        components={"transformer": user.fingerprint}, tensors=parts, compute="F32", scratch=number
    )
    return send(user, job, frames)


# --- the client's own way


def test_forwards_use_one_region_again(
    scene: RanksScene, user: User, asked: list[m.OpenScratch]
) -> None:
    for seed in range(3):
        found = user.forward(large(seed))
        assert (found - scene.file("small").alone(large(seed))).abs().max() < EXACT
    assert [(body.number, body.nbytes, body.instead_of) for body in asked] == [(1, MIB, None)]


def test_answers_stay_as_they_are(user: User) -> None:
    first = user.forward(large(1))
    copy = first.clone()
    user.forward(large(2))
    assert torch.equal(first, copy)


def test_a_larger_latent_gets_a_larger_region_instead(
    user: User, asked: list[m.OpenScratch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module, "_GRANULE", 4096)
    wide = {**large(), "x": torch.randn(1, 4, 80, 64)}
    for inputs in (large(), wide, large()):
        user.forward(inputs)
    assert [(body.number, body.nbytes, body.instead_of) for body in asked] == [
        (1, 128 << 10, None),
        (2, 160 << 10, 1),
    ]


def test_small_latents_travel_as_frames(user: User, asked: list[m.OpenScratch]) -> None:
    inputs = large()
    inputs["x"] = inputs["x"][:, :, :8, :8].contiguous()
    user.forward(inputs)
    assert not asked


def test_half_precision(scene: RanksScene, user: User) -> None:
    inputs = {n: t.bfloat16() if n in ("x", "context", "y") else t for n, t in large().items()}
    found = user.forward(inputs, job=user.job(compute="BF16"))
    whole = scene.file("small").alone(inputs, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.float() - whole.float()).abs().max() < 0.1


def test_each_thread_has_a_region_to_itself(
    scene: RanksScene, user: User, asked: list[m.OpenScratch]
) -> None:
    expected = {seed: user.forward(large(seed)) for seed in range(4)}
    wrong = []

    def work(seed: int) -> None:
        wrong.extend(
            seed for _ in range(5) if not torch.equal(user.forward(large(seed)), expected[seed])
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(asked) <= len(threads)


def test_a_region_is_not_used_again_after_giving_up(user: User, asked: list[m.OpenScratch]) -> None:
    expected = user.forward(large())
    for _ in range(2 * limits.SCRATCHES_PER_SESSION):
        looks = iter([False, False])
        with pytest.raises(Cancelled):
            user.forward(large(2), should_cancel=lambda looks=looks: next(looks, True))
        assert torch.equal(user.forward(large()), expected)
    numbers = [body.number for body in asked]
    assert numbers == list(range(1, len(asked) + 1))
    assert len(asked) > limits.SCRATCHES_PER_SESSION, "none was given up while in use"
    assert all(body.instead_of is not None for body in asked[1:])


def test_what_is_given_up_is_unmapped_though_its_error_is_kept(user: User) -> None:
    user.forward(large())
    before = maps(os.getpid(), "xdit-scratch")
    looks = iter([False, False])
    with pytest.raises(Cancelled) as kept:
        user.forward(large(2), should_cancel=lambda: next(looks, True))
    assert maps(os.getpid(), "xdit-scratch") == before - 1
    assert kept.value.__traceback__ is not None
    user.forward(large())
    assert maps(os.getpid(), "xdit-scratch") == before


def test_without_room_for_regions_latents_travel_as_frames(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps_of = [open_region(user, 100 + n, 4096) for n in range(limits.SCRATCHES_PER_SESSION)]
    expected = user.forward(large())
    session = user.client.session(Deadline(5.0))
    with session.scratches.lend(MIB, lambda body: pytest.fail("asked again")) as lent:
        assert lent is None
    assert expected.isfinite().all()
    del maps_of


def test_a_daemon_that_knows_no_regions_is_not_asked() -> None:
    pool = ScratchPool(ProtocolVersion(1, 0))
    with pool.lend(MIB, lambda body: pytest.fail("asked")) as lent:
        assert lent is None
    assert PROTOCOL_VERSION >= (1, 1)


def test_ranks_unmap_what_ended(scene: RanksScene) -> None:
    def mapped() -> int:
        return sum(maps(pid, "xdit-scratch") for pid in scene.rank_pids)

    with scene.user() as user:
        user.forward(large())
        with scene.user(name="second") as second:
            before = mapped()
            second.forward(large())
            assert mapped() == before + len(scene.rank_pids)
        user.forward(large())  # after what was told to be forgotten
        assert mapped() == before


# --- what a client could try


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"offset": MIB}, "does not lie"),
        ({"offset": limits.SCRATCH}, "does not lie"),
        ({"offset": 4}, "does not lie"),
        ({"shape": [1, 4, 512, 512]}, "does not lie"),
        ({"dtype": "I64"}, "may not lie"),
        ({"name": "context"}, "same name|may not lie"),
        ({"inline": True}, "frames|says twice"),
    ],
)
def test_places_that_are_none(user: User, fields: dict[str, object], words: str) -> None:
    memory = open_region(user)

    def change(part: m.TensorPart) -> m.TensorPart:
        known = {name: getattr(part, name) for name in part.__struct_fields__}
        return m.TensorPart(**{**known, **fields})

    with pytest.raises(BadMessage, match=words):
        by_hand(user, large(), memory, change)


def test_a_region_that_is_not_there(scene: RanksScene, user: User) -> None:
    memory = open_region(user)
    with pytest.raises(BadMessage, match="no scratch region 2"):
        by_hand(user, large(), memory, number=2)
    with scene.user() as other, pytest.raises(BadMessage, match="no scratch region 1"):
        by_hand(other, large(), memory)
    assert isinstance(by_hand(user, large(), memory), m.Output)


def test_more_regions_than_a_session_may_have(user: User) -> None:
    for number in range(limits.SCRATCHES_PER_SESSION):
        open_region(user, number, 4096)
    with pytest.raises(Busy):
        open_region(user, 99, 4096)
    with pytest.raises(BadMessage, match="open already"):
        open_region(user, 1, 4096)


def test_an_output_without_room_comes_as_a_frame(user: User) -> None:
    inputs = large()
    memory = open_region(user, nbytes=inputs["x"].nbytes)
    answer = by_hand(user, inputs, memory)
    assert isinstance(answer, m.Output)
    assert [(part.inline, part.offset) for part in answer.tensors] == [(True, None)]


def test_writing_to_it_meanwhile_harms_the_writer_alone(scene: RanksScene, user: User) -> None:
    """The ranks may read different numbers; nothing else may come of it."""
    memory, done = open_region(user), threading.Event()

    def scribble() -> None:
        while not done.is_set():
            memory[:] = os.urandom(4096) * (MIB // 4096)

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        with scene.user(name="honest") as honest:
            expected = scene.file("small").alone(large())
            for _ in range(5):
                assert isinstance(by_hand(user, large(), memory), m.Output)
                assert (honest.forward(large()) - expected).abs().max() < EXACT
    finally:
        done.set()
        writer.join()


# --- ranks that die


def test_new_ranks_map_what_sessions_have(tmp_path: Path, asked: list[m.OpenScratch]) -> None:
    with running_ranks(tmp_path, 1) as mortal, mortal.user() as user:
        expected = user.forward(large())
        os.kill(mortal.rank_pids[0], signal.SIGKILL)
        with pytest.raises(RankLost):
            user.forward(large())
        mortal.wait_until_ready(2)
        assert torch.equal(user.forward(large()), expected)
    assert [(body.number, body.instead_of) for body in asked] == [(1, None), (2, 1)]
