"""A fault that leaves every shape as it is makes the digits unreadable."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_process import running_daemon
from digits.files import FILES
from digits_scene import BROKEN, FEW, RIGHT, DigitsFiles, Request
from picture_scene import drawing
from ranks_scene import running_ranks
from safetensors.torch import load_file, save_file
from xdit_sidecar.protocol import messages as m

pytestmark = pytest.mark.timeout(240)

_MODULES = Path(__file__).parent / "faults"
FAULTS = ("missing all-to-all", "wrong RoPE rows")
SWAPPED = {
    "two blocks": ("double_blocks.0.img_attn.qkv.weight", "double_blocks.1.img_attn.qkv.weight"),
    "image and text": ("double_blocks.0.img_mod.lin.weight", "double_blocks.0.txt_mod.lin.weight"),
}


def read_with_fault(directory: Path, fault: str, pictures: int = FEW) -> int:
    """How many of so many pictures are read rightly where both of two ranks have this fault."""
    environment = {"PYTHONPATH": str(_MODULES), "XDIT_TEST_FAULT": fault}
    with running_daemon(directory, "--ranks", "2", environment=environment) as daemon:
        daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        with daemon.client("drawer") as client, drawing(client, DigitsFiles()) as drawer:
            settings = {"degrees": m.Degrees(ulysses=2)}
            right = Request(pictures, settings=settings).count_right(drawer)
        # Only where it was meant to be, and there.
        assert daemon.log.count("broken on purpose") == 1  # in what both are forked from
    print(f"read rightly of {pictures} with {fault}: {right}")
    return right


def read_with_swapped_weights(directory: Path, pictures: int = FEW) -> dict[str, int]:
    """How many of so many pictures one rank draws rightly, by what was swapped; "nothing" too."""
    weights = load_file(FILES["transformer"])
    found = {}
    with (
        running_ranks(directory, 1) as scene,
        scene.daemon.client("drawer") as client,
    ):
        for number, (name, (one, other)) in enumerate(SWAPPED.items()):
            path = directory / f"swapped{number}.safetensors"
            save_file({**weights, one: weights[other], other: weights[one]}, path)
            with drawing(client, DigitsFiles(path)) as drawer:
                found[name] = Request(pictures).count_right(drawer)
        with drawing(client, DigitsFiles()) as drawer:
            found["nothing"] = Request(pictures).count_right(drawer)
    print(f"read rightly of {pictures}, swapped: {found}")
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_computes_wrongly_is_seen(tmp_path: Path, fault: str) -> None:
    assert read_with_fault(tmp_path, fault) <= BROKEN * FEW


def test_a_swapped_weight_is_seen(tmp_path: Path) -> None:
    found = read_with_swapped_weights(tmp_path / "ranks")
    assert found.pop("nothing") >= RIGHT * FEW
    assert max(found.values()) <= BROKEN * FEW
