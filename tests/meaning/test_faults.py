"""A fault that leaves every shape as it is still makes the digits unreadable."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon_process import running_daemon
from digits.files import FILES
from digits_scene import RIGHT, DigitsFiles, Request
from picture_scene import drawing
from ranks_scene import running_ranks
from safetensors.torch import load_file, save_file
from xdit_sidecar.protocol import messages as m

pytestmark = pytest.mark.timeout(240)

FAULTS = Path(__file__).parent / "faults"
# Far below what a right computation gives.
BROKEN = 0.6


@pytest.mark.parametrize("fault", ["missing all-to-all", "wrong RoPE rows"])
def test_a_rank_that_computes_wrongly_is_seen(tmp_path: Path, fault: str) -> None:
    environment = {"PYTHONPATH": str(FAULTS), "XDIT_TEST_FAULT": fault}
    with running_daemon(tmp_path, "--ranks", "2", environment=environment) as daemon:
        daemon.wait_for_status(lambda s: s.group.state == "ready", 90)
        with daemon.client("drawer") as client, drawing(client, DigitsFiles()) as drawer:
            degrees = m.Degrees(ulysses=2)
            right = Request(20, seed=2, settings={"degrees": degrees}).count_right(drawer)
        # Only where it was meant to be, and there.
        assert daemon.log.count("broken on purpose") == 2
    print(f"read rightly of 20 with {fault}: {right}")
    assert right <= BROKEN * 20


SWAPPED = {
    "two blocks": ("double_blocks.0.img_attn.qkv.weight", "double_blocks.1.img_attn.qkv.weight"),
    "image and text": ("double_blocks.0.img_mod.lin.weight", "double_blocks.0.txt_mod.lin.weight"),
}


def test_a_swapped_weight_is_seen(tmp_path: Path) -> None:
    weights = load_file(FILES["transformer"])
    found = {}
    with (
        running_ranks(tmp_path / "ranks", 1) as scene,
        scene.daemon.client("drawer") as client,
    ):
        for number, (name, (one, other)) in enumerate(SWAPPED.items()):
            path = tmp_path / f"swapped{number}.safetensors"
            save_file({**weights, one: weights[other], other: weights[one]}, path)
            with drawing(client, DigitsFiles(path)) as drawer:
                found[name] = Request(20, seed=1).count_right(drawer)
        with drawing(client, DigitsFiles()) as drawer:
            found["nothing"] = Request(20, seed=1).count_right(drawer)
    print(f"read rightly of 20, swapped: {found}")
    assert found.pop("nothing") >= RIGHT * 20
    assert max(found.values()) <= BROKEN * 20
