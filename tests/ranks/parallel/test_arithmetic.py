"""Degrees, splits, kernels and the store of keys: what needs no second rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xdit_sidecar.daemon.ranks.parallel import attention_backend
from xdit_sidecar.daemon.ranks.parallel.attention_backend import choose_backend
from xdit_sidecar.daemon.ranks.parallel.config import ConfigError, ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.kv_store import KvEntry, KvStore, Signature
from xdit_sidecar.daemon.ranks.parallel.splits import BatchSplit, TokenSplit, even_ranges

SIGNATURE = Signature(shapes=(), dtype="", patches=2, condition="", adapters="")


@pytest.mark.parametrize("degrees", [{"ulysses": 0}, {"ring": -1}, {"cfg": 1.0}, {"cfg": True}])
def test_degree_that_is_no_count(degrees: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        ParallelConfig(**degrees)


def test_degrees_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="at most 2"):
        ParallelConfig(cfg=3)
    with pytest.raises(ConfigError, match="pipefusion works with cfg only"):
        ParallelConfig(ulysses=2, pipefusion=2)
    with pytest.raises(ConfigError, match="needs 4 ranks, the group has 2"):
        ParallelConfig(ulysses=2, ring=2).check_world(2)
    with pytest.raises(ConfigError, match=r"5 does not divide the model's 24 heads: use one of"):
        ParallelConfig(ulysses=5).check_model(heads=24, blocks=57)
    with pytest.raises(ConfigError, match="a stage would be empty"):
        ParallelConfig(pipefusion=4).check_model(heads=24, blocks=3)
    for degrees in ({"ring": 2}, {"pipefusion": 2}):
        with pytest.raises(ConfigError, match="need NCCL"):
            ParallelConfig(**degrees).check_transport("gloo", "cuda")
        ParallelConfig(**degrees).check_transport("nccl", "cuda")
    ParallelConfig(ulysses=2, cfg=2).check_transport("gloo", "cuda")


def test_config_reads_well() -> None:
    assert str(ParallelConfig(ulysses=4, cfg=2)) == "ulysses4×cfg2"
    assert str(ParallelConfig()) == "single"
    assert ParallelConfig(ulysses=2, ring=3, cfg=2).world_size == 12


@given(length=st.integers(0, 40), ways=st.integers(1, 8))
def test_tokens_are_shared_out_completely(length: int, ways: int) -> None:
    tokens = torch.arange(length)
    splits = [TokenSplit(length, ways, rank) for rank in range(ways)]
    parts = [split.take(tokens, 0) for split in splits]
    shards = [part[: split.shard] for part, split in zip(parts, splits, strict=True)]
    rest = parts[0][splits[0].shard :]
    assert torch.equal(torch.cat([*shards, rest]), tokens)
    assert all(torch.equal(part[splits[0].shard :], rest) for part in parts)
    assert len(rest) < ways


@given(rows=st.integers(1, 9), ways=st.integers(1, 2))
def test_rows_come_back_in_order(rows: int, ways: int) -> None:
    batch = torch.arange(rows)
    split = BatchSplit(rows, ways)
    pieces = [split.take(batch, rank) for rank in range(ways)]
    assert torch.equal(split.join(torch.cat([p for p in pieces if p is not None])), batch)


def test_what_stands_for_all_rows_is_not_split() -> None:
    split = BatchSplit(3, 2)
    assert split.take(None, 0) is None
    for one in (torch.tensor(1.0), torch.tensor([1.0])):
        assert split.take(one, 1) is one


@given(length=st.integers(1, 50), parts=st.integers(1, 10))
def test_ranges_are_even(length: int, parts: int) -> None:
    ranges = even_ranges(length, parts)
    assert [n for start, end in ranges for n in range(start, end)] == list(range(length))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("ring", [1, 2])
def test_cudnn_never_sees_fp32(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], ring: int
) -> None:
    monkeypatch.setattr(attention_backend, "_capability", lambda _device: capability)
    monkeypatch.setattr(attention_backend, "_has_cudnn", lambda: True)
    cuda = torch.device("cuda", 0)
    assert choose_backend(torch.float32, cuda, ring, 128) in ("SDPA", "SDPA_EFFICIENT")
    half = choose_backend(torch.bfloat16, cuda, ring, 128)
    assert half == ("CUDNN" if capability >= (8, 0) else "SDPA_EFFICIENT")
    assert choose_backend(torch.bfloat16, cuda, ring, 132) != "CUDNN"
    if ring > 1:
        # torch's own choice gives no log-sum-exp to merge by.
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert choose_backend(dtype, cuda, ring, 128) != "SDPA"
        with pytest.raises(ConfigError, match="float64"):
            choose_backend(torch.float64, cuda, ring, 128)


def test_store_forgets_the_least_recently_used() -> None:
    store = KvStore(max_entries=3, max_bytes=100)
    for slot in ("a", "b", "c"):
        assert store.put("s", slot, KvEntry(SIGNATURE, nbytes=30))
    assert store.find("s", "a") is not None
    assert store.put("s", "d", KvEntry(SIGNATURE, nbytes=30))
    assert store.find("s", "b") is None
    assert store.put("t", "big", KvEntry(SIGNATURE, nbytes=50))
    assert (len(store), store.nbytes) == (2, 80)
    assert not store.put("t", "huge", KvEntry(SIGNATURE, nbytes=101))
    assert len(store) == 2
    store.forget("s")
    assert store.find("s", "d") is None
    assert store.find("t", "big") is not None
