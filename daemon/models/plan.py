"""Does a model fit on these GPUs, split how, and if not, what would help? Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...protocol import limits
from ...protocol.manifest import DTYPE_BYTES, TensorSpec
from ..gpus import Gpu, Links
from ..ranks.parallel.config import ParallelConfig
from . import memory, plan_words, vae_memory
from .degrees import choose_degrees
from .flux_config import FluxConfig

# What `serve` keeps free for others by default.
RESERVE = 512 * limits.MIB
_FP8 = ("F8_E4M3", "F8_E5M2")
_LATENT = memory.VAE.ratio  # pixels per latent pixel
_SMALLEST_SIDE = 256  # pixels; smaller pictures are no advice


@dataclass(frozen=True)
class Request:
    """What is to be computed at a time: pixels, text tokens, rows of one forward.

    Pictures are decoded one after another.
    ``encoders_on_gpu``: the text encoders lie on every rank's GPU, else in host memory.
    """

    width: int = 1024
    height: int = 1024
    text: int = 512
    batch: int = 1
    encoders_on_gpu: bool = True

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return -(-self.width // memory.TOKEN_PIXELS) * -(-self.height // memory.TOKEN_PIXELS)


@dataclass(frozen=True)
class GpuNeed:
    """One rank's GPU, all in bytes.

    ``companions`` are VAE and text encoders, where they lie there. ``activations`` are the most
    that exists at a time: of a forward, of decoding, or the copies of text encoders in host memory.
    """

    name: str
    total: int
    free: int
    weights: int
    companions: int
    activations: int
    contexts: int
    reserve: int
    needed: int
    left: int


@dataclass(frozen=True)
class Option:
    """Something that would help: what to do, the bytes it saves on the fullest GPU, and whether
    the plan fits with it alone."""

    what: str
    saves: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The recommendation. ``dtype`` is that of the stored weights, ``compute`` that of the forward,
    both as safetensors calls them; ``tiles``: the VAE decodes in tiles. ``reasons``: one
    sentence per choice; ``options`` only where it does not fit."""

    model: str
    dtype: str
    compute: str
    request: Request
    degrees: ParallelConfig
    links: Links
    tiles: bool
    fits: bool
    reasons: list[str]
    gpus: list[GpuNeed]
    options: list[Option]


def make_plan(
    config: FluxConfig,
    tensors: Sequence[TensorSpec],
    gpus: Sequence[Gpu],
    request: Request,
    links: Links = "unknown",
) -> Plan:
    """The largest group of ranks, one per GPU, on which everything fits; else all, and options.

    Raises ValueError without a GPU.
    """
    if not gpus:
        raise ValueError("a plan needs at least one GPU")
    weights = memory.weights_bytes(config, tensors)
    # Those with the most room are used first.
    order = sorted(gpus, key=lambda gpu: -gpu.free)
    for count in range(len(order), 0, -1):
        degrees, needs = _split(config, weights, order[:count], request)
        if _fits(needs):
            break
    else:
        degrees, needs = _split(config, weights, order, request)
    fits = _fits(needs)
    companions = needs[0].companions
    tiles = bool(companions) and _needs_tiles(request, needs)
    return Plan(
        model=config.variant,
        dtype=config.dtypes[0],
        compute=compute_dtype(config),
        request=request,
        degrees=degrees,
        links=links,
        tiles=tiles,
        fits=fits,
        reasons=[
            plan_words.why_dtype(config.dtypes[0], compute_dtype(config)),
            plan_words.why_degrees(degrees, config.heads, request.batch, len(needs), len(gpus)),
            *plan_words.why_links(degrees, links),
            plan_words.why_companions(
                companions, 0 if request.encoders_on_gpu else memory.text_encoder_bytes(config)
            ),
            *plan_words.why_tiles(tiles, _decode_bytes(request, len(needs), tiles=False)),
        ],
        gpus=needs,
        options=[] if fits else _options(_Case(config, weights, order, request)),
    )


def compute_dtype(config: FluxConfig) -> str:
    """What the forward computes in: the weights' dtype, but bf16 for fp8."""
    return "BF16" if config.dtypes[0] in _FP8 else config.dtypes[0]


def _split(
    config: FluxConfig, weights: int, gpus: Sequence[Gpu], request: Request
) -> tuple[ParallelConfig, list[GpuNeed]]:
    degrees = choose_degrees(
        heads=config.heads,
        blocks=config.double_blocks + config.single_blocks,
        ranks=len(gpus),
        rows=request.batch,
        backend="nccl",
        device_type="cuda",
    )
    compute = compute_dtype(config)
    forward = memory.forward_bytes(
        config,
        tokens_image=request.tokens,
        tokens_text=request.text,
        rows=request.batch,
        degrees=degrees,
        compute_item_bytes=DTYPE_BYTES[compute],
        cast_at_use=any(dtype != compute for dtype in config.dtypes),
    )
    encoders = memory.text_encoder_bytes(config)
    # Without known text encoders it is no published FLUX.1, and its VAE is not known either.
    if not encoders:
        return degrees, [_need(gpu, weights, 0, forward) for gpu in gpus]
    # Every rank encodes the prompt and decodes its part of the picture.
    companions = memory.VAE.nbytes + encoders * request.encoders_on_gpu
    tiles = _needs_tiles(request, [_need(gpu, weights, companions, 0) for gpu in gpus])
    # One after another: copied text encoders are given up for forwards, which end before decoding.
    copied = encoders * (not request.encoders_on_gpu)
    most = max(copied, forward, _decode_bytes(request, len(gpus), tiles=tiles))
    return degrees, [_need(gpu, weights, companions, most) for gpu in gpus]


def _needs_tiles(request: Request, needs: Sequence[GpuNeed]) -> bool:
    size = (request.height // _LATENT, request.width // _LATENT)
    room = min(need.left + need.activations for need in needs)
    return vae_memory.needs_tiles(memory.VAE, *size, memory.VAE.dtypes[0], room, len(needs))


def _decode_bytes(request: Request, ranks: int, *, tiles: bool) -> int:
    """Of each rank."""
    size = (request.height // _LATENT, request.width // _LATENT)
    if tiles:
        size = (vae_memory.TILE, vae_memory.TILE)
    return vae_memory.decode_bytes(memory.VAE, *size, memory.VAE.dtypes[0]) // ranks


def _need(gpu: Gpu, weights: int, companions: int, activations: int) -> GpuNeed:
    contexts = memory.KEEPER_CONTEXT + memory.RANK_CONTEXT
    needed = weights + companions + activations + contexts + RESERVE
    return GpuNeed(
        name=gpu.name,
        total=gpu.total,
        free=gpu.free,
        weights=weights,
        companions=companions,
        activations=activations,
        contexts=contexts,
        reserve=RESERVE,
        needed=needed,
        left=gpu.free - needed,
    )


def _fits(needs: Sequence[GpuNeed]) -> bool:
    return all(need.left >= 0 for need in needs)


class _Case(NamedTuple):
    """What a split is made for."""

    config: FluxConfig
    weights: int
    gpus: Sequence[Gpu]
    request: Request


def _options(case: _Case) -> list[Option]:
    """Each change for itself, then all of them at once; only those that save something."""
    _, now = _split(*case)
    tightest = min(range(len(now)), key=lambda number: now[number].left)

    def weigh(what: str, changed: _Case) -> Option:
        _, then = _split(*changed)
        return Option(what, now[tightest].needed - then[tightest].needed, _fits(then))

    kept: list[Option] = []
    everything = case
    for what, change in _changes(case, case.gpus[tightest]):
        option = weigh(what, change(case))
        if option.saves > 0:
            kept.append(option)
            everything = change(everything)
    if len(kept) > 1:
        kept.append(weigh(plan_words.OPTION_ALL, everything))
    return kept


def _changes(case: _Case, fullest: Gpu) -> list[tuple[str, Callable[[_Case], _Case]]]:
    small = _halved(case.request)
    # GPUs to come are taken to be like the fullest one.
    more = [*case.gpus, *[fullest] * len(case.gpus)]
    return [
        (plan_words.OPTION_FP8, _use_fp8),
        (
            plan_words.OPTION_HOST,
            lambda c: c._replace(request=replace(c.request, encoders_on_gpu=False)),
        ),
        (
            plan_words.option_size(small.width, small.height),
            lambda c: c._replace(request=_halved(c.request)),
        ),
        (plan_words.option_gpus(len(more)), lambda c: c._replace(gpus=more)),
    ]


def _use_fp8(case: _Case) -> _Case:
    """The same model from an fp8 file, if it is not one already."""
    if case.config.dtypes[0] in _FP8:
        return case
    config = replace(case.config, dtypes=("F8_E4M3",))
    return case._replace(config=config, weights=memory.fp8_bytes(config))


def _halved(request: Request) -> Request:
    def half(side: int) -> int:
        step = memory.TOKEN_PIXELS
        return min(side, max(_SMALLEST_SIDE, side // 2 // step * step))

    return replace(request, width=half(request.width), height=half(request.height))
