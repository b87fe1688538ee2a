"""One rank's worker: what it unmaps, what it copies, and what it does where room is short."""

from __future__ import annotations

import pytest
import torch
from ranks.components.component_files import SmallVae, random_weights
from ranks.rank_worker import RankWorker, SharedComponent
from xdit_sidecar.daemon.models.vae_memory import decode_bytes
from xdit_sidecar.daemon.ranks import autoencoder
from xdit_sidecar.daemon.ranks import components as components_module
from xdit_sidecar.daemon.ranks.components import OpenComponents
from xdit_sidecar.daemon.ranks.parallel.process_group import RankGroup
from xdit_sidecar.daemon.ranks.reservation import Reservation
from xdit_sidecar.daemon.ranks.vae import model as vae_model
from xdit_sidecar.daemon.ranks.worker import Worker
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import OutOfMemory

MIB = 1 << 20
VAE = SmallVae(multipliers=(1, 1, 2))


class Room(Reservation):
    """With so many bytes free, less what ``taken`` says."""

    def __init__(self, group: RankGroup, free: int) -> None:
        super().__init__(group, reserve=MIB, neighbours=1)
        self.free = free + MIB
        self.taken = lambda: 0

    def _free(self) -> int:
        return self.free - self.taken()


def alone(device: str = "cpu") -> RankGroup:
    return RankGroup(0, 1, torch.device(device), "gloo", 30.0)


def make_worker(free: int = 1 << 40) -> RankWorker:
    group = alone()
    return RankWorker(Worker(group, Room(group, free), compiles=False))


# --- unmapping


def test_a_region_that_something_still_views_is_no_success() -> None:
    rank = make_worker()
    region = rank.open(random_weights(VAE.shapes()), "vae")
    stray = next(iter(rank.worker._components.find(region, "vae").tensors.values()))
    outcome = rank.close(region)
    assert isinstance(outcome, m.Failed)
    assert outcome.code == "rank-fault"  # the rank has to end: only that unmaps the region
    assert "still views vae" in outcome.message
    del stray


def test_a_region_that_modules_viewed_is_unmapped() -> None:
    rank = make_worker()
    region = rank.open(random_weights(VAE.shapes()), "vae")
    outcome = rank.begin(1, m.Decode(components={}, tensors=[], compute="F32"), LATENT)
    assert isinstance(outcome, m.Output), outcome
    assert rank.close(region) == m.Opened()


def test_unmapping_that_takes_too_long_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_worker()
    region = rank.open(random_weights(VAE.shapes()), "vae")
    monkeypatch.setattr(components_module.process_regions, "collect", lambda timeout: False)
    outcome = rank.close(region)
    assert isinstance(outcome, m.Failed)
    assert "could not be unmapped" in outcome.message


# --- copies on the device; "meta" stands for a GPU


def open_on_device(room: Room, *roles: str) -> tuple[OpenComponents, list[str]]:
    """Components of 1 MiB each in host memory, for a rank that computes elsewhere."""
    opened = OpenComponents(torch.device("meta"), room)
    room.give_up = opened.give_up_copies
    room.taken = lambda: opened.copied_bytes
    regions = []
    for number, role in enumerate(roles):
        tensors = {"weight": torch.full((MIB // 4,), float(number))}
        shared = SharedComponent.of(tensors, role, f"{number:032x}")
        opened.open(shared.opened.grant, shared.opened.component, shared.descriptor)
        regions.append(shared.opened.grant.region)
    return opened, regions


def test_components_in_host_memory_are_copied_when_a_job_needs_them() -> None:
    opened, (t5, clip) = open_on_device(Room(alone("meta"), 2 * MIB), "t5", "clip_l")
    assert opened.copied_bytes == 0
    opened.copy_to_device([t5, clip])
    assert opened.copied_bytes == 2 * MIB
    assert opened.find(t5, "t5").tensors["weight"].device.type == "meta"
    opened.copy_to_device([t5, clip])  # nothing is missing
    assert opened.copied_bytes == 2 * MIB
    opened.give_up_copies()
    assert opened.copied_bytes == 0
    assert opened.find(t5, "t5").tensors["weight"].device.type == "cpu"
    opened.close([t5, clip])


def test_copies_that_do_not_fit_are_refused_with_numbers() -> None:
    opened, (t5, clip) = open_on_device(Room(alone("meta"), MIB), "t5", "clip_l")
    said = f"host memory need about {2 * MIB} bytes on each device .* {MIB} are missing"
    with pytest.raises(OutOfMemory, match=said) as refused:
        opened.copy_to_device([t5, clip])
    assert "text encoders on the CPU" not in str(refused.value)  # they are there
    del refused  # its traceback views the regions
    assert opened.copied_bytes == 0
    opened.close([t5, clip])


def test_copies_of_text_encoders_make_room_for_what_else_needs_it() -> None:
    room = Room(alone("meta"), 2 * MIB)
    opened, (t5, vae) = open_on_device(room, "t5", "vae")
    opened.copy_to_device([t5])
    opened.find(t5, "t5").build("modules", lambda: "around the copy")
    opened.copy_to_device([vae])
    room.check(MIB, "a forward")
    assert opened.copied_bytes == MIB  # the VAE's: steps may be followed by it
    assert opened.find(t5, "t5").build("modules", lambda: "anew") == "anew"
    with pytest.raises(OutOfMemory):
        room.check(2 * MIB, "a larger forward")
    opened.close([t5, vae])


def test_what_a_job_is_about_to_use_is_not_given_up_for_the_rest_of_it() -> None:
    opened, (t5, clip) = open_on_device(Room(alone("meta"), MIB), "t5", "clip_l")
    opened.copy_to_device([t5])
    with pytest.raises(OutOfMemory, match=f"{MIB} are missing"):
        opened.copy_to_device([t5, clip])
    assert opened.copied_bytes == MIB
    opened.close([t5, clip])


# --- decoding

LATENT = {"latent": torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "TILE", 8)
    monkeypatch.setattr(vae_model, "TILE", 8)
    monkeypatch.setattr(vae_model, "TILE_OVERLAP", 2)


@pytest.mark.usefixtures("small_tiles")
def test_a_picture_is_decoded_in_tiles_where_the_whole_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiled: list[bool] = []
    original = vae_model.Vae.decode

    def decode(self: vae_model.Vae, latent: torch.Tensor, *, tiles: bool = False) -> torch.Tensor:
        tiled.append(tiles)
        return original(self, latent, tiles=tiles)

    monkeypatch.setattr(vae_model.Vae, "decode", decode)

    def decode_with(free: int) -> m.Outcome:
        rank = make_worker(free)
        region = rank.open(random_weights(VAE.shapes()), "vae")
        outcome = rank.begin(1, m.Decode(components={}, tensors=[], compute="F32"), LATENT)
        assert rank.close(region) == m.Opened()
        return outcome

    rank = make_worker()
    found = rank.worker._engines.autoencoder
    config = found._vae(rank.open(random_weights(VAE.shapes()), "vae"), "F32")[1].config
    whole, tile = (decode_bytes(config, side, side, "F32") for side in (12, 8))
    assert isinstance(decode_with(whole), m.Output)
    assert isinstance(decode_with(whole - 1), m.Output)
    assert isinstance(decode_with(tile), m.Output)
    assert tiled == [False, True, True]
    refused = decode_with(tile - 1)
    assert isinstance(refused, m.Failed)
    assert (refused.code, len(tiled)) == ("out-of-memory", 3)
    del config, found


def test_what_stays_is_not_counted_as_free_again() -> None:
    room = Room(alone(), 8 * MIB)
    room.check(6 * MIB, "a warm step", lasting=4 * MIB)
    room.taken = lambda: 4 * MIB
    room.check(2 * MIB, "a stale step")
    with pytest.raises(OutOfMemory, match=f"{MIB} are missing"):
        room.check(5 * MIB, "another run's warm step", lasting=4 * MIB)
