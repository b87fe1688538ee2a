"""What the ranks draw is what was asked for: a classifier reads the digits, for every parallelism.

Numbers of small random models can agree where both sides are wrong alike. These pictures mean
something.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from digits_scene import CFG, RIGHT, DigitsFiles, Request, reader
from picture_scene import drawing
from ranks_scene import running_ranks
from xdit_sidecar.protocol import messages as m

pytestmark = pytest.mark.timeout(300)

# Ranks → ways to share the work.
WAYS = {
    1: {"single": m.Degrees()},
    2: {
        "ulysses": m.Degrees(ulysses=2),
        "ring": m.Degrees(ring=2),
        "cfg": m.Degrees(cfg=2),
        "pipefusion": m.Degrees(pipefusion=2),
    },
    4: {
        "ulysses": m.Degrees(ulysses=4),
        "ring": m.Degrees(ring=4),
        "ulysses and ring": m.Degrees(ulysses=2, ring=2),
        "cfg and ulysses": m.Degrees(cfg=2, ulysses=2),
        "cfg and pipefusion": m.Degrees(cfg=2, pipefusion=2),
        "pipefusion": m.Degrees(pipefusion=4),
    },
}


def test_the_reader_knows_real_digits_from_others() -> None:
    from digits.pictures import real_digits, to_pictures

    ink, labels = real_digits()
    wrong = [(digit + 1) % 10 for digit in labels.tolist()]
    assert reader().count_right(to_pictures(ink), labels.tolist()) > 0.99 * len(ink)
    assert reader().count_right(to_pictures(ink), wrong) < 0.01 * len(ink)


def read_rightly(directory: Path, ranks: int, *ways: str) -> dict[str, int]:
    """Of 20 pictures for each way, by a daemon with so many ranks."""
    found = {}
    with (
        running_ranks(directory, ranks, "--deadline", "60") as scene,
        scene.daemon.client("drawer") as client,
        drawing(client, DigitsFiles()) as drawer,
    ):
        for way in ways:
            degrees = WAYS[ranks][way]
            # With a negative prompt there are two rows for each picture, as cfg is meant for.
            cfg = {"cfg": CFG} if degrees.cfg > 1 else {}
            request = Request(20, seed=ranks, settings={"degrees": degrees, **cfg})
            found[way] = request.count_right(drawer)
    print(f"read rightly of 20, {ranks} ranks: {found}")
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_digits_are_what_was_asked_for(tmp_path: Path, ranks: int) -> None:
    found = read_rightly(tmp_path / "ranks", ranks, *WAYS[ranks])
    assert min(found.values()) >= RIGHT * 20, found


def test_four_ranks(tmp_path: Path) -> None:
    found = read_rightly(tmp_path / "ranks", 4, "ulysses and ring", "pipefusion")
    assert min(found.values()) >= RIGHT * 20, found


@pytest.mark.soak
def test_four_ranks_in_every_way(tmp_path: Path) -> None:
    found = read_rightly(tmp_path / "ranks", 4, *WAYS[4])
    assert min(found.values()) >= RIGHT * 20, found


@pytest.mark.soak
def test_a_hundred_digits(tmp_path: Path) -> None:
    with (
        running_ranks(tmp_path / "ranks", 2, "--deadline", "60") as scene,
        scene.daemon.client("drawer") as client,
        drawing(client, DigitsFiles()) as drawer,
    ):
        right = sum(Request(20, seed=seed).count_right(drawer) for seed in range(5))
    print(f"read rightly: {right} of 100")
    assert right >= RIGHT * 100
