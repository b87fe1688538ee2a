"""Exchanges by copy engines give what the group's exchanges give, on the fake driver's devices.

On real GPUs: the stage ``several`` of ``make bench-gpu``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fake_cuda.build import fake_libcuda
from ranks.parallel.harness import Nursery, values
from xdit_sidecar.protocol.regions.cuda_driver import LIBRARY_VARIABLE

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed"
    ),
    pytest.mark.timeout(600),
]
MIB = 1 << 20
BLOCKS = 2  # of the tiny model: what a forward sends is 4 tensors of each


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Devices whose copies come late: what is not waited for is not there."""
    return {
        LIBRARY_VARIABLE: fake_libcuda(),
        "FAKE_CUDA_STATE": str(tmp_path / "fake-cuda-state"),
        "FAKE_CUDA_MEMORY": str(8 << 30),
        "FAKE_CUDA_DEVICES": "4",
        "FAKE_CUDA_ASYNC_MS": "1",
    }


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [(2, {"ulysses": 2}), (4, {"ulysses": 4}), (4, {"ulysses": 2, "cfg": 2})],
    ids=["ulysses2", "ulysses4", "ulysses2cfg2"],
)
def test_copies_give_what_the_group_gives(
    nursery: Nursery, settings: dict[str, str], ranks: int, degrees: dict[str, int]
) -> None:
    # Smaller and larger ones, another batch; the third has rests, which the group exchanges.
    runs = [([64, 16], 2), ([32, 8], 2), ([63, 16], 2), ([512, 64], 4), ([64, 16], 2)]
    outcomes = nursery.run("copy_heads", ranks, settings=settings, degrees=degrees, runs=runs)
    for found in values(outcomes):
        assert found["same"] == [True] * len(runs)
        assert found["copied"] == [4 * BLOCKS] * 2 + [0] + [4 * BLOCKS] * 2
        small, *_, large = found["held"]
        assert small == found["held"][1] == 2 * MIB
        assert large > small
        assert found["freed"]
        assert found["again"]
        assert found["refusal"] is None


@pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"])
def test_who_cannot_share_memory_exchanges_by_the_group(
    nursery: Nursery, settings: dict[str, str], call: str
) -> None:
    outcomes = nursery.run("fail_to_copy", 2, settings=settings, call=call)
    able, unable = values(outcomes)
    assert call in unable["refusal"]
    assert able["refusal"] == "another rank cannot"
    for found in (able, unable):
        assert found["same"] == [True, True]
        assert found["copied"] == 0
        assert found["freed"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [("write_value", "does not come"), ("copy_on_device_async", "comes as something else")],
)
def test_what_does_not_come_as_it_is_is_not_trusted(
    nursery: Nursery, settings: dict[str, str], fault: str, told: str
) -> None:
    outcomes = nursery.run("lose_copies", 2, settings=settings, fault=fault)
    first, second = values(outcomes)
    assert first["refusal"] == f"what rank 1 of them sends {told}"
    for found in (first, second):
        assert found["refusal"]
        assert found["same"] == [True] * 3
        assert found["copied"] == 0
        assert found["later"] == 4 * BLOCKS  # once all was given up


def test_recorded_copies(nursery: Nursery, settings: dict[str, str]) -> None:
    lengths = [[64, 16], [32, 8]]
    outcomes = nursery.run("record_copies", 2, settings=settings, lengths=lengths, count=12)
    for found in values(outcomes):
        assert found["same"] == [True] * 12
        assert found["recorded"] == 2
        assert found["refusal"] is None
