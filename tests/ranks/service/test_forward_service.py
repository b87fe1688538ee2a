"""The ranks' forward is the local one; what cannot be computed is a typed error and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec
import pytest
import torch
from flux_inputs import Inputs, comfy_inputs
from ranks_scene import EXACT, SMALL, RanksScene, User
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.deadline import Deadline
from xdit_sidecar.protocol.errors import (
    BadJob,
    BadMessage,
    MissingComponent,
    SidecarError,
    TooLarge,
    UnsupportedModel,
)
from xdit_sidecar.protocol.tensors import pack_tensor

NOWHERE = "file:" + "0" * 64
Change = Callable[[Inputs], Inputs]


def assert_same(found: torch.Tensor, expected: torch.Tensor, bound: float = EXACT) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= bound


# --- the same numbers


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(12, 8), (2, 2), (6, 10)])
def test_forward_is_the_local_one(
    scene: RanksScene, user: User, size: tuple[int, int], batch: int
) -> None:
    inputs = comfy_inputs(SMALL, height=size[0], width=size[1], batch=batch, text=5 + batch)
    assert_same(user.forward(inputs), scene.file("small").alone(inputs))


def test_forward_of_one_rank(lone_scene: RanksScene) -> None:
    with lone_scene.user() as user:
        for batch in (1, 2):
            inputs = comfy_inputs(SMALL, batch=batch, seed=batch)
            assert_same(user.forward(inputs), lone_scene.file("small").alone(inputs))


def test_odd_sizes_are_padded_and_cut(user: User) -> None:
    inputs = comfy_inputs(SMALL, height=10, width=8)
    cut = {**inputs, "x": inputs["x"][:, :, :9, :7].contiguous()}
    padded = {**cut, "x": torch.nn.functional.pad(cut["x"], (0, 1, 0, 1), mode="circular")}
    assert_same(user.forward(cut), user.forward(padded)[:, :, :9, :7])


def test_a_reference_latent(scene: RanksScene, user: User) -> None:
    inputs = comfy_inputs(SMALL, reference=(8, 8))
    assert_same(user.forward(inputs), scene.file("small").alone(inputs))


def test_more_than_ten_reference_latents_stay_in_order(user: User) -> None:
    inputs = comfy_inputs(SMALL, batch=1)
    del inputs["y"], inputs["guidance"]  # a message has room for fifteen tensors
    references = [comfy_inputs(SMALL, batch=1, height=2, width=2, seed=s)["x"] for s in range(11)]
    two_and_ten = list(references)
    two_and_ten[2], two_and_ten[10] = two_and_ten[10], two_and_ten[2]

    def forward(given: list[torch.Tensor], pad: str) -> torch.Tensor:
        named = {f"ref_latents.{n:{pad}}": latent for n, latent in enumerate(given)}
        return user.forward({**inputs, **named})

    assert_same(forward(references, ""), forward(references, "02"))
    assert (forward(references, "") - forward(two_and_ten, "")).abs().max() > EXACT


def test_guidance_counts(user: User) -> None:
    inputs = comfy_inputs(SMALL)
    other = {**inputs, "guidance": torch.full((2,), 1.5)}
    assert (user.forward(inputs) - user.forward(other)).abs().max() > 1e-3


@pytest.mark.parametrize("degree", ["ulysses", "ring", "cfg", "pipefusion"])
def test_degrees(scene: RanksScene, user: User, degree: str) -> None:
    inputs = comfy_inputs(SMALL)
    job = user.job(degrees=m.Degrees(**{degree: 2}), run="once")
    assert_same(user.forward(inputs, job=job), scene.file("small").alone(inputs))


def test_pipefusion_keeps_prompts_apart_that_have_no_digest(scene: RanksScene, user: User) -> None:
    # A first step is exact; with another prompt it is a first step again.
    job = user.job(degrees=m.Degrees(pipefusion=2), run="prompts")
    for seed in (1, 2):
        inputs = comfy_inputs(SMALL, batch=1, seed=seed)
        inputs["timestep"] = torch.tensor([0.9 - 0.1 * seed])
        expected = scene.file("small").alone(inputs)
        assert_same(user.forward(inputs, job=job, keep=()), expected)


@pytest.mark.parametrize("compute", ["F16", "BF16"])
def test_dtypes_beside_each_other(scene: RanksScene, user: User, compute: str) -> None:
    inputs = comfy_inputs(SMALL)
    exact = scene.file("small").alone(inputs)
    found = user.forward(inputs, job=user.job(compute=compute))
    assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}[compute]
    error = (found.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    assert_same(user.forward(inputs), exact)


def test_products_in_fp8_only_where_a_job_asks_for_them(scene: RanksScene, user: User) -> None:
    inputs = comfy_inputs(SMALL)
    exact = scene.file("small").alone(inputs)
    found = user.forward(inputs, job=user.job(fp8_matmul=True))
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.15
    assert_same(user.forward(inputs), exact)
    assert all(rank.copied > 0 for rank in scene.status.ranks)  # told, as any copy


def test_an_fp8_file(scene: RanksScene) -> None:
    file = scene.file("fp8", dtype="F8_E4M3", scales="scaled_fp8", small="BF16")
    inputs = comfy_inputs(SMALL)
    with scene.user(file) as user:
        found = user.forward(inputs)
    exact = scene.file("small").alone(inputs)
    assert (found - exact).norm() / exact.norm() < 0.2


def test_an_answer_with_no_tokens_of_text(user: User) -> None:
    inputs = comfy_inputs(SMALL, text=1)
    assert user.forward(inputs).isfinite().all()


# --- what cannot be computed


def without(name: str) -> Change:
    return lambda inputs: {key: value for key, value in inputs.items() if key != name}


def replaced(name: str, value: torch.Tensor) -> Change:
    return lambda inputs: {**inputs, name: value}


WRONG: dict[str, Change] = {
    "no x": without("x"),
    "no timestep": without("timestep"),
    "no context": without("context"),
    "five channels": replaced("x", torch.zeros(2, 5, 12, 8)),
    "flat x": replaced("x", torch.zeros(2, 4)),
    "no pixels": replaced("x", torch.zeros(2, 4, 0, 8)),
    "no rows": replaced("x", torch.zeros(0, 4, 12, 8)),
    "other rows": replaced("context", torch.zeros(3, 7, 24)),
    "narrow context": replaced("context", torch.zeros(2, 7, 23)),
    "flat context": replaced("context", torch.zeros(24)),
    "narrow y": replaced("y", torch.zeros(2, 3)),
    "too many times": replaced("timestep", torch.zeros(3)),
    "a time of no dimensions": replaced("timestep", torch.tensor(0.5)),
    "guidance of two dimensions": replaced("guidance", torch.ones(2, 1)),
    "reference of other channels": replaced("ref_latents.0", torch.zeros(2, 3, 4, 4)),
    "reference of other rows": replaced("ref_latents.0", torch.zeros(1, 4, 4, 4)),
    "reference with no number": replaced("ref_latents.last", torch.zeros(2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors(user: User, name: str) -> None:
    with pytest.raises(BadJob):
        user.forward(WRONG[name](comfy_inputs(SMALL)))
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_are_refused_or_taken_for_numbers(user: User, dtype: torch.dtype) -> None:
    for name in ("x", "timestep", "context", "y", "guidance"):
        inputs = comfy_inputs(SMALL)
        inputs[name] = (inputs[name].abs() * 3).to(dtype)
        with contextlib.suppress(BadJob):
            user.forward(inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_numbers_that_are_none(user: User, value: float) -> None:
    for name in ("x", "timestep", "context", "y", "guidance"):
        inputs = comfy_inputs(SMALL)
        inputs[name] = torch.full_like(inputs[name], value)
        user.forward(inputs)
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()


@pytest.mark.parametrize(
    "degrees",
    [
        {"ulysses": 4},
        {"ulysses": 2, "ring": 2},
        {"ulysses": 1},
        {"ulysses": 3},
        {"pipefusion": 64},
        {"cfg": 64, "ring": 64, "ulysses": 64, "pipefusion": 64},
    ],
)
def test_wrong_degrees(user: User, degrees: dict[str, int]) -> None:
    with pytest.raises(BadJob):
        user.forward(comfy_inputs(SMALL), job=user.job(degrees=m.Degrees(**degrees)))
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()


def test_components_that_are_not_there(user: User) -> None:
    known = user.fingerprint
    wrong: list[m.Forward] = [
        user.job(components={"transformer": NOWHERE}),
        user.job(components={}),
        user.job(components={"vae": known}),
        # Found and opened in nobody's book: the next forward must still open it in all ranks.
        user.job(adapters=[m.Adapter(NOWHERE)]),
    ]
    for job in wrong:
        with pytest.raises(MissingComponent):
            user.forward(comfy_inputs(SMALL), job=job)
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()


def test_a_component_beside_one_that_is_missing_is_opened_later(scene: RanksScene) -> None:
    with scene.user(scene.file("opened-late", seed=5)) as user:
        with pytest.raises(MissingComponent):
            user.forward(comfy_inputs(SMALL), job=user.job(adapters=[m.Adapter(NOWHERE)]))
        inputs = comfy_inputs(SMALL)
        assert_same(user.forward(inputs), scene.file("opened-late").alone(inputs))


def test_components_in_the_wrong_place(user: User) -> None:
    as_lora = user.job(adapters=[m.Adapter(user.fingerprint)])
    with pytest.raises((BadJob, UnsupportedModel)):
        user.forward(comfy_inputs(SMALL), job=as_lora)
    as_vae = m.Decode(components={"vae": user.fingerprint}, tensors=[], compute="F32")
    with pytest.raises((BadJob, UnsupportedModel)):
        user.ranks.run(as_vae, {"latent": torch.zeros(1, 4, 4, 4)})
    as_text = m.EncodeText(
        components={"clip_l": user.fingerprint, "t5": user.fingerprint}, tensors=[]
    )
    ids = torch.zeros(1, 77, dtype=torch.int64)
    with pytest.raises((BadJob, UnsupportedModel)):
        user.ranks.run(as_text, {"clip_l_ids": ids, "t5_ids": ids})


# --- hostile frames


def send(user: User, body: m.Job, frames: list[bytes]) -> m.AnswerBody:
    """A job as it is, without the client's care."""
    deadline = Deadline(20.0)
    session = user.client.session(deadline)
    return user.client.exchanges.exchange(session, body, deadline, frames)[0]


def packed(user: User) -> tuple[m.Forward, list[bytes]]:
    """A good job and its frames."""
    pairs = [pack_tensor(name, tensor) for name, tensor in comfy_inputs(SMALL).items()]
    job = msgspec.structs.replace(user.job(), tensors=[part for part, _ in pairs])
    return job, [bytes(data) for _, (data,) in pairs]


def test_frames_that_are_not_the_tensors(user: User) -> None:
    job, frames = packed(user)
    parts = job.tensors
    renamed = [*parts[:-1], msgspec.structs.replace(parts[-1], name="x")]
    nameless = [*parts[:-1], msgspec.structs.replace(parts[-1], inline=False)]
    huge = [*parts[:-1], msgspec.structs.replace(parts[-1], shape=[2**31] * 8)]
    for wrong, sent in [
        (parts, frames[:-1]),
        (parts, [*frames, b""]),
        (parts, [*frames[:-1], frames[-1][:-1]]),
        (parts, [*frames[:-1], frames[-1] + b"x"]),
        (parts, []),
        (renamed, frames),
        (nameless, frames[:-1]),
        (huge, frames),
    ]:
        with pytest.raises(BadMessage):
            send(user, msgspec.structs.replace(job, tensors=wrong), sent)
    assert isinstance(send(user, job, frames), m.Output)


def test_numbers_out_of_bounds_are_no_message(user: User) -> None:
    job, frames = packed(user)
    for strength in (float("nan"), float("inf"), 1e7):
        wrong = msgspec.structs.replace(job, adapters=[m.Adapter(user.fingerprint, strength)])
        with pytest.raises(BadMessage, match="adapters"):
            send(user, wrong, frames)
    for name in ("cfg", "guidance", "denoise"):
        picture = m.Generate(
            components=job.components,
            tensors=[],
            **{name: float("nan")},  # type: ignore[arg-type]
        )
        with pytest.raises(BadMessage):
            send(user, picture, [])


def test_a_tensor_of_several_frames(user: User) -> None:
    inputs = comfy_inputs(SMALL)
    expected = user.forward(inputs)
    ballast = torch.zeros(limits.BULK_FRAME + 1, dtype=torch.uint8)
    found = user.forward({"ballast": ballast, **inputs})
    assert torch.equal(found, expected)


def test_too_much_at_once_is_refused_here_and_not_by_silence(user: User) -> None:
    inputs = comfy_inputs(SMALL)
    inputs["x"] = torch.zeros(1, 4, 4100, 4100)
    with pytest.raises(TooLarge, match="smaller"):
        user.forward(inputs)
    with pytest.raises(TooLarge):
        user.client.echo([b""] * limits.BULK_PARTS)
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()


def test_only_ranks_are_given_tasks(user: User) -> None:
    with pytest.raises(SidecarError, match="only ranks"):
        send(user, m.NextTask(), [])  # type: ignore[arg-type]
