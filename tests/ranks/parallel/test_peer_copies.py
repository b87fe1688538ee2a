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
    ("ranks", "degrees", "skew"),
    [
        (2, {"ulysses": 2}, 0),
        (4, {"ulysses": 4}, 0),
        (4, {"ulysses": 2, "cfg": 2}, 0),
        (2, {"ulysses": 2}, 0.03),
        (4, {"ulysses": 4}, 0.03),
    ],
    ids=["ulysses2", "ulysses4", "ulysses2cfg2", "ulysses2skewed", "ulysses4skewed"],
)
def test_copies_give_what_the_group_gives(
    nursery: Nursery, settings: dict[str, str], ranks: int, degrees: dict[str, int], skew: float
) -> None:
    # Smaller and larger ones, another batch; the third has rests, which the group exchanges.
    runs = [([64, 16], 2), ([32, 8], 2), ([63, 16], 2), ([512, 64], 4), ([64, 16], 2)]
    more = {"degrees": degrees, "runs": runs, "skew": skew}
    for found in values(nursery.run("copy_heads", ranks, settings=settings, **more)):
        assert found["same"] == [True] * len(runs)
        assert found["copied"] == [4 * BLOCKS] * 2 + [0] + [4 * BLOCKS] * 2
        small, *_, large = found["held"]
        assert small == found["held"][1] == 2 * MIB
        assert large > small
        assert found["freed"]
        assert found["again"]
        assert found["refusal"] is None


@pytest.mark.parametrize(
    ("call", "lasting"),
    [("cuMemAlloc_v2", False), ("cuIpcGetMemHandle", True), ("cuIpcOpenMemHandle_v2", True)],
)
def test_who_cannot_share_memory_exchanges_by_the_group(
    nursery: Nursery, settings: dict[str, str], call: str, lasting: bool
) -> None:
    outcomes = nursery.run("fail_to_copy", 2, settings=settings, call=call)
    able, unable = values(outcomes)
    assert call in unable["refusal"]
    assert "another rank cannot" in able["refusal"]
    for found in (able, unable):
        assert found["same"] == [True] * 5
        assert found["larger"] == 0
        assert found["smaller"] == 4 * BLOCKS  # what there was is used
        assert found["freed"]
        # There may be room once all was given up; a board stays as it is.
        assert found["later"] == (0 if lasting else 4 * BLOCKS)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"name": "write_value", "after": 0, "otherwise": None}, "does not come"),
        ({"name": "write_value", "after": 0, "otherwise": 7}, "comes as something else"),
        ({"name": "write_value", "after": 3, "otherwise": None}, "does not come"),
        ({"name": "copy_on_device_async", "after": 0, "otherwise": None}, "as something else"),
    ],
    ids=["no flag", "another flag", "the last flag", "no bytes"],
)
def test_what_does_not_come_as_it_is_is_not_trusted(
    nursery: Nursery, settings: dict[str, str], fault: dict[str, object], told: str
) -> None:
    outcomes = nursery.run("lose_copies", 2, settings=settings, patience=2.0, **fault)
    first, second = values(outcomes)
    assert "what rank 1 sends" in first["refusal"]
    assert told in first["refusal"]
    for found in (first, second):
        assert found["refusal"]
        assert found["same"] == [True] * 3
        assert found["copied"] == 0
        assert found["freed"]


@pytest.mark.parametrize("after", [1, 3, 4, 7])
def test_after_a_forward_that_was_given_up_ranks_begin_anew(
    nursery: Nursery, settings: dict[str, str], after: int
) -> None:
    """Flags are left of it, but for between two blocks."""
    outcomes = nursery.run("give_up_in_the_middle", 2, settings=settings, after=after)
    for found in values(outcomes):
        if after % 4:
            assert "ranks must begin anew" in found["refused"]
        else:
            assert found["same"]


@pytest.mark.parametrize("old", [True, False])
def test_without_a_driver_for_it_a_rank_says_why(
    nursery: Nursery, settings: dict[str, str], tmp_path: Path, old: bool
) -> None:
    library = tmp_path / "libcuda.so"
    if old:  # a symbol by another name is not found
        content = Path(fake_libcuda()).read_bytes()
        renamed = content.replace(b"cuStreamBatchMemOp_v2", b"cuStreamBatchMemOp_v9")
        library.write_bytes(renamed)
    settings = {**settings, LIBRARY_VARIABLE: str(library)}
    for found in values(nursery.run("look_for_copies", 2, settings=settings)):
        assert not found["found"]
        assert found["before"] is None
        assert ("CUDA 11.7 or later" if old else "cannot be loaded") in found["told"]


def test_recorded_copies(nursery: Nursery, settings: dict[str, str]) -> None:
    lengths = [[64, 16], [32, 8]]
    outcomes = nursery.run("record_copies", 2, settings=settings, lengths=lengths, count=12)
    for found in values(outcomes):
        assert found["same"] == [True] * 12
        assert found["recorded"] == 2
        assert found["refusal"] is None
