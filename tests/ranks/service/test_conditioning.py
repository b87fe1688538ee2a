"""Conditioning travels once, is known to its session alone, and is forgotten with it."""

from __future__ import annotations

import pytest
import torch
from flux_inputs import comfy_inputs
from ranks.service.test_forward_service import send
from ranks_scene import EXACT, SMALL, RanksScene, User
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.exchange import Exchanges
from xdit_sidecar.protocol.errors import BadJob
from xdit_sidecar.protocol.tensors import describe_tensor, digest_tensor, pack_tensor


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the raw frames of each job that a client sends."""
    counted: list[int] = []
    original = Exchanges.open

    def count(self, session, body, deadline, frames=()):  # type: ignore[no-untyped-def]
        if isinstance(body, m.Forward):
            counted.append(sum(memoryview(frame).nbytes for frame in frames))
        return original(self, session, body, deadline, frames)

    monkeypatch.setattr(Exchanges, "open", count)
    return counted


def test_its_bytes_are_sent_once(user: User, sent: list[int]) -> None:
    inputs = comfy_inputs(SMALL, batch=1)
    whole = sum(tensor.nbytes for tensor in inputs.values())
    conditioning = inputs["context"].nbytes + inputs["y"].nbytes
    first = user.forward(inputs)
    # A sampler makes the same tensors anew for each step.
    again = {name: tensor.clone() for name, tensor in inputs.items()}
    assert torch.equal(user.forward(again), first)
    assert sent == [whole, whole - conditioning]


def test_two_prompts_in_turns(scene: RanksScene, user: User, sent: list[int]) -> None:
    prompts = [comfy_inputs(SMALL, seed=seed) for seed in (1, 2)]
    expected = [scene.file("small").alone(inputs) for inputs in prompts]
    for _ in range(3):
        for inputs, local in zip(prompts, expected, strict=True):
            assert (user.forward(inputs) - local).abs().max() < EXACT
    assert sent[0] == sent[1] > sent[2]
    assert len(set(sent[2:])) == 1


def test_a_prompt_that_failed_is_sent_again(user: User, sent: list[int]) -> None:
    inputs = comfy_inputs(SMALL)
    with pytest.raises(BadJob):
        user.forward({**inputs, "x": torch.zeros(2, 3, 4, 4)})
    user.forward(inputs)
    assert len(sent) == 2


def test_it_is_forgotten_when_its_session_ends(scene: RanksScene) -> None:
    before = scene.group
    with scene.user() as user:
        inputs = comfy_inputs(SMALL)
        user.forward(inputs)
        kept = scene.group
        assert kept.kept_tensors == before.kept_tensors + 2
        added = inputs["context"].nbytes + inputs["y"].nbytes
        assert kept.kept_bytes == before.kept_bytes + added
    scene.daemon.wait_for_status(lambda s: s.group.kept_tensors == before.kept_tensors)


def named_only(user: User) -> tuple[m.Forward, list[bytes], bytes]:
    """A job that names its context and does not bring it."""
    inputs = comfy_inputs(SMALL)
    digest = digest_tensor(inputs["context"])
    parts, frames = [], []
    for name, tensor in inputs.items():
        if name == "context":
            parts.append(describe_tensor(name, tensor, digest, inline=False))
        else:
            part, data = pack_tensor(name, tensor)
            parts.append(part)
            frames += map(bytes, data)
    return m.Forward(**{**_fields(user.job()), "tensors": parts}), frames, digest


def _fields(job: m.Forward) -> dict[str, object]:
    return {name: getattr(job, name) for name in job.__struct_fields__}


def test_what_was_never_sent_is_asked_for(user: User) -> None:
    job, frames, digest = named_only(user)
    assert send(user, job, frames) == m.Need([digest])


def test_what_another_session_sent_is_asked_for(scene: RanksScene, user: User) -> None:
    user.forward(comfy_inputs(SMALL))
    job, frames, digest = named_only(user)
    assert isinstance(send(user, job, frames), m.Output)
    with scene.user() as other:
        assert send(other, job, frames) == m.Need([digest])


def test_a_digest_of_other_bytes_harms_its_session_alone(scene: RanksScene, user: User) -> None:
    inputs = comfy_inputs(SMALL)
    digest = digest_tensor(inputs["context"])
    pairs = [
        pack_tensor(name, tensor * 0 if name == "context" else tensor, digest)
        if name == "context"
        else pack_tensor(name, tensor)
        for name, tensor in inputs.items()
    ]
    liar = m.Forward(**{**_fields(user.job()), "tensors": [part for part, _ in pairs]})
    assert isinstance(send(user, liar, [bytes(data) for _, (data,) in pairs]), m.Output)
    with scene.user() as other:
        expected = scene.file("small").alone(inputs)
        assert (other.forward(inputs) - expected).abs().max() < EXACT


def test_more_prompts_than_a_client_remembers(user: User) -> None:
    for seed in range(20):
        user.forward(comfy_inputs(SMALL, height=2, width=2, batch=1, seed=seed))
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()
