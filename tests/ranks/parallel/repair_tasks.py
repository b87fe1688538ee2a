"""What a rank does to show what each repair of xfuser is for: it loads xfuser without some."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rank_tasks import CPU, Place
from tiny_flux import make_inputs, make_model, root_mean_square, run_plain
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.contexts import ParallelContext
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import REPAIRS, load_xfuser

DEADLINE = 3.0  # seconds; what hangs without a repair raises then


def _load(without: list[str]) -> Any:
    load_xfuser(CPU, without=frozenset(without))
    import xfuser.core.distributed.attention_backend as backends

    return backends


def only_load(place: Place, *, without: list[str]) -> bool:
    """Importing is all there is to it."""
    _load(without)
    return True


def load_under_cuda_build(place: Place, *, without: list[str]) -> str:
    """The device type that xfuser gives to buffers of a CPU rank, on a CUDA build of torch."""
    torch.version.cuda = "13.0"
    _load(without)
    import xfuser.envs

    found = xfuser.envs.get_device(0).type
    assert found == "cpu", f"buffers would be on {found}"
    return str(found)


def use_default_backend(place: Place, *, without: list[str]) -> str:
    """The communication backend that xfuser takes where nobody names one."""
    _load(without)
    import xfuser.core.distributed.parallel_state as parallel_state

    return str(parallel_state.envs.get_torch_distributed_backend())


def count_functional_calls(place: Place, *, without: list[str]) -> int:
    """Collectives of the kind made for compilers, in an eager forward of two blocks."""
    _load(without)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            Count.found += "c10d_functional::all_to_all" in function.name()
            return function(*args, **(kwargs or {}))

    context = ParallelContext.build(ParallelConfig(ulysses=2), place.join(DEADLINE))
    given = FluxInputs(**make_inputs(1, 17, 5, 2, torch.float32))
    with Count():
        ParallelFlux(make_model(torch.float32)).forward(context, given)
    assert not Count.found, f"{Count.found} functional collectives"
    return Count.found


def forward_exactly(place: Place, *, degrees: dict[str, int], without: list[str]) -> float:
    """RMS difference to the single process; AssertionError if it is no rounding."""
    _load(without)
    context = ParallelContext.build(ParallelConfig(**degrees), place.join(DEADLINE))
    given = make_inputs(1, 17, 5, 2, torch.float32)
    alone = run_plain(make_model(torch.float32), given)
    flux = ParallelFlux(make_model(torch.float32))
    difference = root_mean_square(flux.forward(context, FluxInputs(**given)) - alone)
    assert difference < 1e-4, f"wrong by {difference}"
    return difference


def merge_padded_lse(place: Place, *, without: list[str]) -> list[int]:
    """The log-sum-exp's shape for 5 queries, from a kernel that pads it as torch's does on CUDA."""
    name = "efficient_kernel_pads_lse"
    backends = _load([name])
    kind = backends.AttentionBackendType.SDPA_EFFICIENT
    backends.ATTENTION_FUNCTION_REGISTRY[kind] = lambda query, *_: (query, torch.zeros(1, 2, 32))
    _apply_unless(name, without)
    query = torch.zeros(1, 2, 5, 8)
    _, lse = backends.ATTENTION_FUNCTION_REGISTRY[kind](query, query, query, 0.0, False)
    assert lse.shape == (1, 2, 5), lse.shape
    return list(lse.shape)


def attend_in_fp32(place: Place, *, without: list[str]) -> bool:
    """Refused, where a kernel answers fp32 with NaN as cuDNN's does."""
    name = "cudnn_is_silent_about_fp32"
    backends = _load([name])
    kind = backends.AttentionBackendType.CUDNN
    backends.ATTENTION_FUNCTION_REGISTRY[kind] = lambda query, *_: (query * float("nan"), None)
    _apply_unless(name, without)
    query = torch.zeros(1, 2, 5, 8)
    try:
        output, _ = backends.ATTENTION_FUNCTION_REGISTRY[kind](query, query, query, 0.0, False)
    except TypeError:
        return True
    raise AssertionError(f"NaN without an error: {bool(output.isnan().all())}")


def _apply_unless(name: str, without: list[str]) -> None:
    if name not in without:
        next(repair for repair in REPAIRS if repair.name == name).apply()


def count_kept_keys(place: Place, *, without: list[str]) -> bool:
    """USP keeps no keys and values for a layer that some wrapper has registered."""
    _load(without)
    from xfuser.core.cache_manager.cache_manager import get_cache_manager
    from xfuser.model_executor.layers.usp import USP

    ParallelContext.build(ParallelConfig(), place.join(DEADLINE))
    layer = torch.nn.Identity()
    get_cache_manager().register_cache_entry(layer, "attn")
    query = torch.zeros(1, 2, 5, 8)
    USP(query, query, query, attn_layer=layer)
    kept = get_cache_manager().cache["attn", layer].tensors[0]
    assert kept is None, f"{kept.numel()} numbers kept"
    return True


class _Bomb:
    """Runs code wherever it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self.path),)


def pass_object(place: Place, *, without: list[str]) -> bool:
    """No code of the peer has run."""
    _load(without)
    place.join(DEADLINE)
    from xfuser.core.distributed import get_world_group

    proof = place.directory / "code-has-run"
    world = get_world_group()
    with suppress(RuntimeError):
        if place.rank == 0:
            world.send_object(_Bomb(str(proof)), 1)
        else:
            world.recv_object(0)
    assert place.rank == 0 or not proof.exists(), "the peer's code has run"
    return True


def pass_through_pipeline(place: Place, *, without: list[str]) -> float:
    """Both stages send without keeping the handle, then receive: what the other has sent."""
    _load(without)
    context = ParallelContext.build(ParallelConfig(pipefusion=2), place.join(DEADLINE))
    stages = context.pipeline_group
    stages.set_config(torch.float32)
    for round_number in range(3):
        stages.pipeline_isend(torch.full((2, 3), float(place.rank)), segment_idx=round_number)
        received = stages.pipeline_recv(round_number)
        assert received.eq(1 - place.rank).all(), received
    # The peer may still be reading.
    place.signal(f"done{place.rank}")
    place.wait_for(f"done{1 - place.rank}")
    return float(received.mean())


def load_twice(place: Place, *, without: list[str]) -> list[str]:
    """What is said to a second load, to another device, and after a foreign import."""
    from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import XfuserUnusable

    said = []
    sys.modules["xfuser"] = sys
    try:
        load_xfuser(CPU)
    except XfuserUnusable as error:
        said.append(str(error))
    del sys.modules["xfuser"]
    load_xfuser(CPU)
    load_xfuser(CPU)
    for other in ("cuda", "mps"):
        try:
            load_xfuser(torch.device(other))
        except XfuserUnusable as error:
            said.append(str(error))
    return said


def listen_to_logs(place: Place, *, without: list[str]) -> str:
    """What xfuser prints from its import to a first forward, and the environment it leaves."""
    log = place.directory / "log"
    os.environ["LOG_LEVEL"] = "mine"
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        forward_exactly(place, degrees={}, without=without)
        sys.stdout.flush()
    assert os.environ["LOG_LEVEL"] == "mine"
    return "\n".join(line for line in log.read_text().splitlines() if "xfuser" in line)


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        *(only_load, load_under_cuda_build, use_default_backend, forward_exactly),
        *(merge_padded_lse, attend_in_fp32, count_kept_keys, count_functional_calls),
        pass_object,
        *(pass_through_pipeline, load_twice, listen_to_logs),
    )
}
