"""What ``auto`` means, over many models and groups: exact products, and what each rank can do."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdit_sidecar.daemon.models.degrees import Backend, DeviceType, choose_degrees
from xdit_sidecar.daemon.ranks.parallel.config import ConfigError, ParallelConfig


def choose(
    ranks: int,
    rows: int = 1,
    *,
    heads: int = 24,
    blocks: int = 57,
    backend: Backend = "nccl",
    device_type: DeviceType = "cuda",
) -> ParallelConfig:
    return choose_degrees(
        heads=heads,
        blocks=blocks,
        ranks=ranks,
        rows=rows,
        backend=backend,
        device_type=device_type,
    )


@pytest.mark.parametrize(
    ("ranks", "rows", "expected"),
    [
        (1, 1, ParallelConfig()),
        (1, 4, ParallelConfig()),
        (2, 1, ParallelConfig(ulysses=2)),
        (2, 2, ParallelConfig(cfg=2)),
        (3, 2, ParallelConfig(ulysses=3)),
        (4, 1, ParallelConfig(ulysses=4)),
        (4, 3, ParallelConfig(ulysses=2, cfg=2)),
        (5, 1, ParallelConfig(ring=5)),
        (8, 1, ParallelConfig(ulysses=8)),
        (8, 2, ParallelConfig(ulysses=4, cfg=2)),
        (10, 2, ParallelConfig(ring=5, cfg=2)),
        (16, 1, ParallelConfig(ulysses=8, ring=2)),
        (18, 1, ParallelConfig(ulysses=6, ring=3)),
        (24, 1, ParallelConfig(ulysses=24)),
    ],
)
def test_flux_on_gpus(ranks: int, rows: int, expected: ParallelConfig) -> None:
    assert choose(ranks, rows) == expected


@given(
    heads=st.integers(1, 64),
    blocks=st.integers(1, 60),
    ranks=st.integers(1, 64),
    rows=st.integers(1, 9),
    backend=st.sampled_from(["nccl", "gloo"]),
    device_type=st.sampled_from(["cuda", "cpu"]),
)
def test_degrees_always_fit_or_are_refused(
    heads: int, blocks: int, ranks: int, rows: int, backend: Backend, device_type: DeviceType
) -> None:
    shared = backend == "gloo" and device_type == "cuda"
    cfg = 2 if rows > 1 and ranks % 2 == 0 else 1
    try:
        config = choose(
            ranks, rows, heads=heads, blocks=blocks, backend=backend, device_type=device_type
        )
    except ConfigError as error:
        # Refused only where ulysses alone cannot: and what the text names instead does work.
        assert shared
        assert heads % (ranks // cfg)
        fewer = int(str(error).split("; use ")[1].split(" ranks")[0])
        assert 1 <= fewer < ranks
        choose(fewer, rows, heads=heads, backend=backend, device_type=device_type)
        return
    assert config.world_size == ranks
    assert config.cfg == cfg
    assert config.pipefusion == 1
    assert not (shared and config.ring > 1)
    # No larger ulysses degree would do.
    larger = range(config.ulysses + 1, config.sequence + 1)
    assert not [n for n in larger if heads % n == 0 and config.sequence % n == 0]
    config.check_model(heads, blocks)
    config.check_transport(backend, device_type)


def test_a_group_on_one_gpu_has_no_ring() -> None:
    assert choose(5, backend="gloo", device_type="cpu") == ParallelConfig(ring=5)
    with pytest.raises(ConfigError) as caught:
        choose(5, backend="gloo")
    text = str(caught.value)
    assert "5 ranks cannot share 24 heads" in text
    assert "use 4 ranks, or give each rank a GPU of its own" in text


@pytest.mark.parametrize(("ranks", "rows"), [(0, 1), (1, 0), (-2, 2)])
def test_nothing_to_share_is_refused(ranks: int, rows: int) -> None:
    with pytest.raises(ConfigError, match="at least one of each"):
        choose(ranks, rows)


def test_planning_brings_in_no_torch() -> None:
    names = ["models.degrees", "models.memory", "models.plan", "tokenizers", "commands.plan"]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(f"xdit_sidecar.daemon.{{name}}")
    heavy = {{"torch", "numpy", "transformers"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
