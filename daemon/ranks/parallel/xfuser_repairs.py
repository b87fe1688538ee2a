"""What xfuser 0.7.0 needs before a resident rank can use it, on the CPU and on CUDA.

Each repair is one function with the fault it mends. Only names inside xfuser are replaced; torch
and yunchang stay as they are. ``load_xfuser`` applies them, around the first import of xfuser.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor

from ..unasked_driver import unasked_driver
from .ulysses import exchange_shares

TESTED_VERSIONS = SpecifierSet(">=0.7,<0.8")
_BOTH = frozenset({"cpu", "cuda"})
_CPU = frozenset({"cpu"})
_CUDA = frozenset({"cuda"})
_SHAPE_WORDS = 8  # a shape message: how many dimensions, then up to seven sizes
_ABSENT = "xfuser is not installed: pip install '.[daemon]' in a clone of the repository"


class XfuserUnusable(RuntimeError):
    """xfuser is missing, of an untested version, or was imported too early."""


@dataclass(frozen=True)
class Repair:
    """One fault of xfuser 0.7.x and the function that mends it."""

    name: str
    devices: frozenset[str]  # device types of ranks that need it
    before_import: bool
    apply: Callable[[], None]


REPAIRS: list[Repair] = []
_loaded_for: str | None = None


def _repair(devices: frozenset[str], *, before_import: bool = False) -> Callable[[Any], Any]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        name = function.__name__.lstrip("_")
        REPAIRS.append(Repair(name, devices, before_import, function))
        return function

    return register


def guard_version(installed: str | None = None) -> str:
    """The installed version of xfuser; XfuserUnusable if it is none that was tested.

    The repairs replace private names, so on another version they could do silent harm.
    """
    if installed is None:
        try:
            installed = importlib.metadata.version("xfuser")
        except importlib.metadata.PackageNotFoundError:
            raise XfuserUnusable(_ABSENT) from None
    if Version(installed) not in TESTED_VERSIONS:
        raise XfuserUnusable(
            f"xfuser {installed} was never tested with xdit-sidecar, which repairs faults of "
            f"xfuser {TESTED_VERSIONS}: install one of these, or a newer xdit-sidecar"
        )
    return installed


def load_xfuser(device: torch.device, *, without: frozenset[str] = frozenset()) -> None:
    """Import xfuser for ranks on ``device``, repaired. Once per process; then a no-op.

    ``without`` names repairs to leave out, to show what they are for. Raises XfuserUnusable.
    """
    global _loaded_for
    if device.type not in _BOTH:
        raise XfuserUnusable(f"ranks on {device.type!r} are not supported: use cuda or cpu")
    if _loaded_for is not None:
        if _loaded_for != device.type:
            raise XfuserUnusable(
                f"xfuser is loaded for {_loaded_for} in this process, not for {device.type}: "
                "start another rank process"
            )
        return
    guard_version()
    if "xfuser" in sys.modules:
        raise XfuserUnusable("xfuser was imported before its repairs: call load_xfuser first")
    wanted = [r for r in REPAIRS if device.type in r.devices and r.name not in without]
    with _quiet_logging(), unasked_driver():
        for repair in wanted:
            if repair.before_import:
                repair.apply()
        xfuser = importlib.import_module("xfuser")
        xfuser.envs = sys.modules["xfuser.envs"]  # type: ignore[attr-defined]
        for module in ("model_executor.layers.usp", "core.distributed.group_coordinator"):
            importlib.import_module(f"xfuser.{module}")
        for repair in wanted:
            if not repair.before_import:
                repair.apply()
    # It calls a collective by a name that newer versions of torch warn of.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    _loaded_for = device.type


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """0.7.0 logs at DEBUG to stdout and into LOG_DIR, whatever XDIT_LOGGING_LEVEL says.

    It reads the two general names once, while it is imported, so they are set no longer.
    """
    os.environ.setdefault("XDIT_LOGGING_LEVEL", "ERROR")
    saved = {name: os.environ.pop(name, None) for name in ("LOG_LEVEL", "LOG_DIR")}
    os.environ["LOG_LEVEL"] = os.environ["XDIT_LOGGING_LEVEL"]
    try:
        yield
    finally:
        del os.environ["LOG_LEVEL"]
        os.environ.update({name: value for name, value in saved.items() if value is not None})


def _load_envs() -> Any:
    """``xfuser.envs`` alone: the rest copies its values while it is imported."""
    if "xfuser.envs" not in sys.modules:
        spec = importlib.util.find_spec("xfuser")
        if spec is None:
            raise XfuserUnusable(_ABSENT)
        # The package's own __init__ would import everything.
        sys.modules["xfuser"] = importlib.util.module_from_spec(spec)
        try:
            importlib.import_module("xfuser.envs")
        finally:
            del sys.modules["xfuser"]
    return sys.modules["xfuser.envs"]


def _module(name: str) -> Any:
    return importlib.import_module(f"xfuser.{name}")


# --- before xfuser is imported -------------------------------------------------------------------


@_repair(_BOTH, before_import=True)
def _stand_in_for_triton() -> None:
    """A module of sparse attention imports triton, which xfuser does not declare.

    CPU builds of torch come without it, and nothing here uses that kind of attention.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    name = "xfuser.core.sparge_attention.block_mask"
    module = types.ModuleType(name)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("sparse attention needs triton, which is not installed")

    module.__dict__["get_block_map_meansim"] = refuse
    sys.modules[name] = module


@_repair(_CPU, before_import=True)
def _cpu_ranks_on_cuda_torch() -> None:
    """xfuser takes the device from how torch was built, not from where the rank computes.

    A CPU rank under a CUDA build of torch would get buffers on a GPU, or none is there at all.
    """
    envs = _load_envs()
    envs._is_cuda = envs._is_hip = lambda: False


@_repair(_CPU, before_import=True)
def _cuda_version_without_cuda() -> None:
    """``xfuser.config`` compares CUDA_VERSION on import; without an accelerator that raises."""
    _load_envs().get_device_version = lambda: None  # read as 0.0


@_repair(_CPU, before_import=True)
def _backend_without_cuda() -> None:
    """Without an accelerator, asking for the default communication backend raises."""
    _load_envs().get_torch_distributed_backend = lambda: "gloo"


@_repair(_BOTH, before_import=True)
def _sequence_parallel_without_cuda() -> None:
    """Without CUDA xfuser takes yunchang for missing and makes every sequence group of size 1.

    While it is imported there is no CUDA for it on a GPU either: see :mod:`..unasked_driver`.
    """
    _load_envs().PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True


# --- after it ------------------------------------------------------------------------------------


@_repair(_BOTH)
def _process_groups_without_cuda() -> None:
    """Without CUDA, as there is during imports, modules that exchange have no process groups."""
    groups = importlib.import_module("yunchang.globals").PROCESS_GROUP
    for name, module in list(sys.modules.items()):
        if name.startswith("xfuser.") and vars(module).get("PROCESS_GROUP", ...) is None:
            module.__dict__["PROCESS_GROUP"] = groups


@_repair(_CPU)
def _ring_kernel_without_cuda() -> None:
    """Ring attention merges pieces by their log-sum-exp, and no kernel gives one on the CPU."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: object = None,
    ) -> tuple[Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = kernel(query, key, value, dropout_p, is_causal)
        return output, lse

    backends = _module("core.distributed.attention_backend")
    kind = backends.AttentionBackendType.SDPA_FLASH
    backends.ATTENTION_FUNCTION_REGISTRY[kind] = attend


@_repair(_CUDA)
def _efficient_kernel_pads_lse() -> None:
    """torch's memory-efficient kernel pads the log-sum-exp to 32 queries; the ring cannot merge."""
    backends = _module("core.distributed.attention_backend")
    kind = backends.AttentionBackendType.SDPA_EFFICIENT
    original = backends.ATTENTION_FUNCTION_REGISTRY[kind]

    def attend(query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, lse = original(query, *rest, **options)
        return output, lse[..., : query.shape[-2]]

    backends.ATTENTION_FUNCTION_REGISTRY[kind] = attend


@_repair(_CUDA)
def _cudnn_is_silent_about_fp32() -> None:
    """cuDNN's operator, called as xfuser does, answers fp32 with NaN and no error."""
    backends = _module("core.distributed.attention_backend")
    kind = backends.AttentionBackendType.CUDNN
    original = backends.ATTENTION_FUNCTION_REGISTRY[kind]

    def attend(query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"cuDNN attention computes fp16 and bf16 only, not {query.dtype}")
        output, lse = original(query, *rest, **options)
        return output, lse

    backends.ATTENTION_FUNCTION_REGISTRY[kind] = attend


@_repair(_BOTH)
def _layers_keep_keys_and_values() -> None:
    """USP stores keys and values for any layer that a wrapper ever registered.

    A second update in another layout where the wrapper has made one (SD3, Flux.2), and 1.6 GB
    per rank for nothing under plain sequence parallelism. PipeFusion here has its own store.
    """
    _module("model_executor.layers.usp")._has_kv_cache = lambda _layer: False


@_repair(_BOTH)
def _all_to_all_for_compilers() -> None:
    """USP exchanges heads by a functional collective, which is made for code that is compiled.

    Called as it is it gives a tensor subclass that is waited for in Python, twice in each block.
    What is compiled here does not contain the exchange.
    """
    usp = _module("model_executor.layers.usp")
    usp._sdpa_all_to_all_single = lambda x: exchange_shares(x, usp.PROCESS_GROUP.ULYSSES_PG)


@_repair(_BOTH)
def _object_collectives_unpickle() -> None:
    """The coordinators send Python objects as pickles, which run code: refused instead."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("objects do not travel between ranks, only tensors do")

    coordinator = _module("core.distributed.group_coordinator").GroupCoordinator
    for verb in ("send", "recv", "broadcast"):
        for kind in ("object", "object_list", "tensor_dict"):
            if hasattr(coordinator, f"{verb}_{kind}"):
                setattr(coordinator, f"{verb}_{kind}", refuse)


@_repair(_CPU)
def _pipeline_drops_sends() -> None:
    """PipeFusion forgets the handle of each isend, and gloo drops a send with its handle."""
    coordinator = _module("core.distributed.group_coordinator").PipelineGroupCoordinator
    original = coordinator._pipeline_isend

    def send(self: Any, tensor: Tensor) -> Any:
        work = original(self, tensor)
        _keep_until_sent(self, work, tensor)
        return work

    coordinator._pipeline_isend = send


@_repair(_CPU)
def _pipeline_shapes_deadlock() -> None:
    """Stages tell each other shapes with sends that block, in both directions at once.

    A gloo send ends when it is received, so both would wait for ever; before that, they call
    torch.cuda.synchronize, which raises. One message without waiting instead: the number of
    dimensions and the sizes together.
    """
    coordinator = _module("core.distributed.group_coordinator").PipelineGroupCoordinator

    def exchange(
        self: Any, tensor_send_to_next: Tensor | None = None, recv_prev: bool = False
    ) -> torch.Size:
        if tensor_send_to_next is not None:
            words = [tensor_send_to_next.ndim, *tensor_send_to_next.shape]
            words += [0] * (_SHAPE_WORDS - len(words))
            message = torch.tensor(words, dtype=torch.int64)
            work = dist.isend(message, self.next_rank, group=self.cpu_group)
            _keep_until_sent(self, work, message)
        if not recv_prev:
            return torch.Size([0, 0, 0])
        message = torch.empty(_SHAPE_WORDS, dtype=torch.int64)
        dist.recv(message, self.prev_rank, group=self.cpu_group)
        ndim, *sizes = message.tolist()
        return torch.Size(sizes[:ndim])

    coordinator._communicate_shapes = exchange


def _keep_until_sent(coordinator: Any, work: Any, tensor: Tensor) -> None:
    pending = coordinator.__dict__.setdefault("_sends_in_flight", [])
    pending[:] = [entry for entry in pending if not entry[0].is_completed()]
    pending.append((work, tensor))
