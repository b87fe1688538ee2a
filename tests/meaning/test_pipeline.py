"""What the ranks draw is what was asked for: a classifier reads the digits, for every parallelism.

Numbers of small random models can agree where both sides are wrong alike. These pictures mean
something.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from digits_scene import CFG, FEW, RIGHT, DigitsFiles, Request, reader
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


def read_rightly(directory: Path, ranks: int, *ways: str, pictures: int = FEW) -> dict[str, int]:
    """How many pictures, of so many in each way, by a daemon with so many ranks."""
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
            request = Request(pictures, settings={"degrees": degrees, **cfg})
            found[way] = request.count_right(drawer)
    print(f"read rightly of {pictures}, {ranks} ranks: {found}")
    return found


def test_digits_in_fp8_are_others_and_can_be_read(tmp_path: Path) -> None:
    with (
        running_ranks(tmp_path / "ranks", 2) as scene,
        scene.daemon.client("drawer") as client,
        drawing(client, DigitsFiles()) as drawer,
    ):
        request = Request(FEW, settings={"fp8_matmul": True})
        found, exact = request.draw(drawer), Request(FEW).draw(drawer)
    assert request.count_read(found) >= RIGHT * FEW
    assert 1e-3 < (found - exact).abs().mean() < 0.1


# One rank is in test_faults.py, and every way for four in the soak.
@pytest.mark.parametrize(
    ("ranks", "ways"), [(2, tuple(WAYS[2])), (4, ("ulysses and ring", "pipefusion"))]
)
def test_digits_are_what_was_asked_for(tmp_path: Path, ranks: int, ways: tuple[str, ...]) -> None:
    found = read_rightly(tmp_path / "ranks", ranks, *ways)
    assert min(found.values()) >= RIGHT * FEW, found
