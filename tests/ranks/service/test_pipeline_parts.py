"""Decode, Encode and EncodeText as jobs of their own; what is missing or wrong is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import project
import pytest
import torch
from flux_inputs import Inputs
from picture_scene import (
    EXACT,
    ROLES,
    STEPS,
    TINY,
    Drawer,
    PipelineFiles,
    drawing,
    ids_of,
    negative,
    noise_of,
)
from ranks_scene import RanksScene, some_inputs
from xdit_sidecar.daemon.models.sources import NODES
from xdit_sidecar.daemon.ranks.sampling.latent_format import to_vae
from xdit_sidecar.daemon.ranks.sampling.noise import seeded_noise
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import BadJob, MissingComponent, TooLarge, UnsupportedModel

NODE_FOLDER = "comfy_client_node/nodes"
LOAD = "`xdit-sidecar load FILE`"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PipelineFiles:
    return TINY.write(tmp_path_factory.mktemp("pipeline-parts"))


@pytest.fixture
def drawer(scene: RanksScene, files: PipelineFiles) -> Iterator[Drawer]:
    """A client with every part of a tiny pipeline resident."""
    with scene.daemon.client("drawer") as client, drawing(client, files) as made:
        yield made


def decode(drawer: Drawer, latent: torch.Tensor, **more: Any) -> torch.Tensor:
    job = m.Decode(components=drawer.only("vae"), tensors=[], compute="F32", **more)
    return drawer.ranks.run(job, {"latent": latent})["image"]


def encode(drawer: Drawer, image: torch.Tensor) -> torch.Tensor:
    job = m.Encode(components=drawer.only("vae"), tensors=[], compute="F32")
    return drawer.ranks.run(job, {"image": image})["latent"]


# --- parts


@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (1, 16, 1, 6), (1, 16, 2, 1)], ids=str)
def test_decode(drawer: Drawer, files: PipelineFiles, shape: tuple[int, ...]) -> None:
    # One row of latent pixels is less than there are ranks.
    latent = seeded_noise(shape, 1)
    found = decode(drawer, latent)
    torch.testing.assert_close(found, files.vae.decode(latent), rtol=0, atol=EXACT)


def test_decode_in_tiles(drawer: Drawer, files: PipelineFiles) -> None:
    latent = seeded_noise((1, 16, 70, 4), 1)  # a tile is 64 high
    tiled, whole = decode(drawer, latent, tiles=True), decode(drawer, latent)
    expected = files.vae.decode(latent, tiles=True)
    torch.testing.assert_close(tiled, expected, rtol=0, atol=EXACT)
    assert 0 < (tiled - whole).abs().max() < 0.5


def test_encode(drawer: Drawer, files: PipelineFiles) -> None:
    image = torch.rand((2, 43, 50, 3), generator=torch.Generator().manual_seed(1))
    found = encode(drawer, image)
    assert found.shape == (2, 16, 5, 6)
    torch.testing.assert_close(found, files.vae.encode(image), rtol=0, atol=EXACT)


def test_encode_text(drawer: Drawer, files: PipelineFiles) -> None:
    ids = ids_of(rows=2)
    job = m.EncodeText(components=drawer.only("clip_l", "t5"), tensors=[])
    found = drawer.ranks.run(job, ids)
    expected = files.encode_text(ids)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=EXACT)


def test_a_picture_in_two_jobs(drawer: Drawer) -> None:
    whole = drawer.draw(ids_of(), seed=3)
    latent = drawer.draw(ids_of(), "vae", seed=3, decode=False)
    assert latent.keys() == {"latent"}
    assert torch.equal(latent["latent"], whole["latent"])
    assert torch.equal(decode(drawer, latent["latent"]), whole["image"])


# --- what is missing


@pytest.mark.parametrize("role", ROLES)
def test_a_part_that_the_job_does_not_name(drawer: Drawer, role: str) -> None:
    with pytest.raises(MissingComponent) as caught:
        drawer.draw(ids_of(), role)
    text = str(caught.value)
    assert f"this job names no {role}, and needs one: hand it over with the node" in text
    assert NODES[role] in text
    assert LOAD in text


def test_the_nodes_that_are_named_exist() -> None:
    sources = "".join(path.read_text() for path in (project.ROOT / NODE_FOLDER).glob("*.py"))
    for node in NODES.values():
        assert f'display_name="{node}"' in sources


@pytest.mark.parametrize("role", ROLES)
def test_a_part_that_is_not_resident(drawer: Drawer, role: str) -> None:
    absent = {**drawer.components, role: "file:" + "0" * 64}
    with pytest.raises(MissingComponent) as caught:
        drawer.draw(ids_of(), components=absent)
    text = str(caught.value)
    assert f"the {role} of this job is not resident on cpu: hand it over with the node" in text
    assert NODES[role] in text
    assert LOAD in text
    job = m.Decode(components={}, tensors=[])
    with pytest.raises(MissingComponent, match="names no vae, and needs one"):
        drawer.ranks.run(job, {"latent": noise_of(1)})


def test_a_part_in_the_wrong_role(drawer: Drawer) -> None:
    swapped = {**drawer.components, "vae": drawer.components["transformer"]}
    with pytest.raises(UnsupportedModel, match=r"is a FLUX\.1 transformer, not a VAE"):
        drawer.draw(ids_of(), components=swapped, steps=1)


def test_a_preview_without_a_vae(drawer: Drawer) -> None:
    seen: list[tuple[int, int, torch.Tensor | None]] = []
    found = drawer.draw(
        ids_of(), "vae", decode=False, preview=True, on_step=lambda *step: seen.append(step)
    )
    last = seen[-1][2]
    assert last is not None
    assert last.dtype == torch.float32
    # The last step's is the finished latent, as the transformer knows it.
    torch.testing.assert_close(to_vae(last[None]), found["latent"])


# --- what cannot be computed: told to the client, and the ranks go on


WRONG_PICTURES: dict[str, tuple[dict[str, Any], Inputs, str]] = {
    "no prompt": ({}, {"clip_l_ids": torch.zeros((1, 77), dtype=torch.int64)}, "'t5_ids'"),
    "no negative": ({"cfg": 2.0}, ids_of(), "'negative_clip_l_ids'"),
    "half a negative": (
        {"cfg": 2.0},
        {**ids_of(), **negative({"t5_ids": ids_of()["t5_ids"]})},
        "'negative_clip_l_ids'",
    ),
    "tokens beyond the vocabulary": ({}, {**ids_of(), "t5_ids": torch.tensor([[999]])}, "999"),
    "tokens that are no integers": ({}, {**ids_of(), "t5_ids": torch.zeros(1, 4)}, "int64"),
    "too few tokens for CLIP": (
        {},
        {**ids_of(), "clip_l_ids": torch.zeros((1, 9), dtype=torch.int64)},
        "CLIP takes 77",
    ),
    "a prompt for other latents": ({"batch": 3}, ids_of(rows=2), "give 1 or 3 rows"),
    "a sampler": ({"sampler": "lms"}, ids_of(), "sampler 'lms' is unknown; use one of: euler"),
    "a scheduler": ({"scheduler": "karras"}, ids_of(), "use one of: simple, normal"),
    "a long schedule": ({"denoise": 1e-4, "steps": 20}, ids_of(), "raise denoise"),
    "sigmas": ({}, {**ids_of(), "sigmas": torch.ones(3)}, "use two or more that fall"),
    "a latent without rows": ({}, {**ids_of(), "latent": torch.zeros(16, 4, 4)}, "latent of shape"),
    "a latent of SDXL": ({}, {**ids_of(), "latent": torch.ones(1, 4, 8, 8)}, "has 4 channels"),
    "noise of another size": (
        {},
        {**ids_of(), "latent": noise_of(1), "noise": torch.ones(1, 16, 8, 8)},
        "latent has shape",
    ),
    "a mask": ({}, {**ids_of(), "mask": torch.ones(3)}, "a noise mask of shape"),
    "too many ranks": ({"degrees": m.Degrees(ulysses=4)}, ids_of(), "4"),
    "degrees that the model cannot have": (
        {"degrees": m.Degrees(ulysses=1, ring=2, pipefusion=1)},
        {"context": torch.zeros(1, 3, 8), "y": torch.zeros(1, 64)},
        "context has shape",
    ),
}


@pytest.mark.parametrize("what", WRONG_PICTURES)
def test_impossible_pictures(drawer: Drawer, scene: RanksScene, what: str) -> None:
    settings, tensors, sentence = WRONG_PICTURES[what]
    with pytest.raises(BadJob) as caught:
        drawer.draw(tensors, **settings)
    assert sentence in str(caught.value)
    assert scene.group.state == "ready"


def test_impossible_encodings_and_decodings(drawer: Drawer, scene: RanksScene) -> None:
    for image in (
        torch.zeros(8, 8, 3),
        torch.zeros(1, 8, 8, 4),
        torch.zeros(1, 4, 8, 3),
        torch.zeros((1, 8, 8, 3), dtype=torch.int64),
    ):
        with pytest.raises(BadJob, match="images of shape"):
            encode(drawer, image)
    for latent in (torch.zeros(16, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 0, 8)):
        with pytest.raises(BadJob, match="a latent of shape"):
            decode(drawer, latent)
    assert scene.group.state == "ready"


def test_pictures_too_large_to_be_sent_are_refused_before_the_first_step(drawer: Drawer) -> None:
    seen: list[int] = []
    with pytest.raises(TooLarge, match="use a smaller batch or picture"):
        drawer.draw(
            ids_of(),
            width=16384,
            height=16384,
            batch=64,
            on_step=lambda step, *_: seen.append(step),
        )
    assert not seen
    latent = torch.zeros(1, 16, 600, 600)  # 4800 squared, fp32
    with pytest.raises(TooLarge, match="the image of this job has 276480000 bytes"):
        decode(drawer, latent)


def test_the_others_are_served_after_all_that(drawer: Drawer, scene: RanksScene) -> None:
    with scene.user() as user:
        assert user.forward(some_inputs()).isfinite().all()
    assert len(drawer.draw(ids_of(), steps=STEPS)) == 2
