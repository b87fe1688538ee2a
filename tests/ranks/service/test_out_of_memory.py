"""A job that does not fit: what nobody uses goes, then a typed error, and never a restart."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from flux_inputs import comfy_inputs
from ranks_scene import EXACT, SMALL, maps, running_ranks
from xdit_sidecar.protocol.errors import OutOfMemory

GIB = 1 << 30
ROOM = 5 * GIB  # left by the reserve; what runs beside this test takes and gives back less
SIDE = 2896  # latent pixels: the largest that a message carries; a forward needs 9 GiB


@pytest.mark.skipif(
    psutil.virtual_memory().available < ROOM + 4 * GIB, reason="needs 9 GiB of free memory"
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_that_does_not_fit(tmp_path: Path, ranks: int) -> None:
    reserve = psutil.virtual_memory().available - ROOM
    with running_ranks(tmp_path, ranks, "--reserve", str(reserve)) as scene:
        with scene.user(scene.file("idle", seed=4)) as idle:
            idle.forward(comfy_inputs(SMALL))
        with scene.user() as user:
            inputs = comfy_inputs(SMALL, batch=1)
            expected = scene.file("small").alone(inputs)
            assert (user.forward(inputs) - expected).abs().max() < EXACT
            assert [maps(pid) for pid in scene.rank_pids] == [2] * ranks
            scene.daemon.wait_for_status(
                lambda s: not any(c.sessions for c in s.components if "idle" in c.label)
            )
            huge = {**inputs, "x": torch.zeros(1, 4, SIDE, SIDE, dtype=torch.float16)}
            with pytest.raises(OutOfMemory, match=r"smaller picture.*used by"):
                user.forward(huge)
            (left,) = scene.status.components
            assert left.fingerprint == user.fingerprint
            assert [maps(pid) for pid in scene.rank_pids] == [1] * ranks
            assert (user.forward(inputs) - expected).abs().max() < EXACT
        assert scene.starts == 1
        scene.daemon.wait_for_log("job-out-of-memory")
