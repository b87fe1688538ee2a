"""Each repair of xfuser does its work, and something fails where it is left out."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from ranks.parallel.harness import Nursery
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import (
    REPAIRS,
    XfuserUnusable,
    guard_version,
)

needs_xfuser = pytest.mark.skipif(
    importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed"
)
LIMIT = 40.0  # seconds; hangs end by the ranks' own deadline of 3 s

# Repair → what shows it: a task, the number of ranks, its arguments, and what is said without.
NO_CUDA = "NotImplementedError: No Accelerators"
SHOWN_BY: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "stand_in_for_triton": ("only_load", 1, {}, "No module named 'triton'"),
    "cpu_ranks_on_cuda_torch": ("load_under_cuda_build", 1, {}, "buffers would be on cuda"),
    "cuda_version_without_cuda": ("only_load", 1, {}, NO_CUDA),
    "backend_without_cuda": ("use_default_backend", 1, {}, NO_CUDA),
    "sequence_parallel_without_cuda": (
        *("forward_exactly", 2, {"degrees": {"ulysses": 2}}),
        "'yunchang' not found",
    ),
    "process_groups_without_cuda": (
        *("forward_exactly", 2, {"degrees": {"ulysses": 2}}),
        "no attribute 'ULYSSES_PG'",
    ),
    "ring_kernel_without_cuda": (
        *("forward_exactly", 2, {"degrees": {"ring": 2}}),
        "Could not run 'aten::_scaled_dot_product_flash_attention'",
    ),
    "efficient_kernel_pads_lse": ("merge_padded_lse", 1, {}, "32"),
    "cudnn_is_silent_about_fp32": ("attend_in_fp32", 1, {}, "NaN without an error: True"),
    "layers_keep_keys_and_values": ("count_kept_keys", 1, {}, "160 numbers kept"),
    "all_to_all_for_compilers": ("count_functional_calls", 2, {}, " functional collectives"),
    "object_collectives_unpickle": ("pass_object", 2, {}, "the peer's code has run"),
    "pipeline_drops_sends": ("pass_through_pipeline", 2, {}, "Timed out waiting 3000ms for recv"),
    "pipeline_shapes_deadlock": (
        *("pass_through_pipeline", 2, {}),
        "Timed out waiting 3000ms for send",
    ),
}


def test_every_repair_is_shown() -> None:
    assert {repair.name for repair in REPAIRS} == set(SHOWN_BY)
    assert all(repair.apply.__doc__ for repair in REPAIRS)


@needs_xfuser
@pytest.mark.parametrize("task", sorted({task for task, *_ in SHOWN_BY.values()}))
def test_all_is_well_with_all_repairs(bare_nursery: Nursery, task: str) -> None:
    variants = {str(shown[:3]): shown for shown in SHOWN_BY.values() if shown[0] == task}
    for _, ranks, arguments, _ in variants.values():
        for outcome in bare_nursery.run(task, ranks, limit=LIMIT, without=[], **arguments):
            outcome.get()


@needs_xfuser
@pytest.mark.parametrize("repair", SHOWN_BY)
def test_something_fails_without(bare_nursery: Nursery, repair: str) -> None:
    if repair == "stand_in_for_triton" and importlib.util.find_spec("triton"):
        pytest.skip("triton is installed, nothing stands in for it")
    task, ranks, arguments, said = SHOWN_BY[repair]
    outcomes = bare_nursery.run(task, ranks, limit=LIMIT, without=[repair], **arguments)
    assert any(o.status == "raised" and said in o.value for o in outcomes), outcomes
    assert not any(o.status == "hung" for o in outcomes), "no deadline ended it"


@needs_xfuser
def test_xfuser_is_loaded_once_and_first(bare_nursery: Nursery) -> None:
    (outcome,) = bare_nursery.run("load_twice", 1, without=[])
    too_early, other_device, unsupported = outcome.get()
    assert "call load_xfuser first" in too_early
    assert "start another rank process" in other_device
    assert "use cuda or cpu" in unsupported


@needs_xfuser
def test_xfuser_is_quiet(bare_nursery: Nursery) -> None:
    (outcome,) = bare_nursery.run("listen_to_logs", 1, without=[])
    assert outcome.get() == ""


@pytest.mark.parametrize("version", ["0.6.1", "0.8.0", "0.8.0rc1", "1.0"])
def test_untested_version_is_refused(version: str) -> None:
    with pytest.raises(XfuserUnusable, match=f"xfuser {version} was never tested"):
        guard_version(version)


@pytest.mark.parametrize("version", ["0.7", "0.7.0", "0.7.9"])
def test_tested_version_is_taken(version: str) -> None:
    assert guard_version(version) == version
