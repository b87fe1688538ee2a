"""FLUX.1 forwards of the rank group: the resident model, its LoRA stacks, its parallel contexts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...protocol import limits
from ...protocol import messages as m
from ...protocol.regions.cuda_driver import CudaUnavailable
from ..models.degrees import choose_degrees
from ..models.flux_config import FluxConfig
from ..models.flux_detection import detect_flux
from ..models.memory import forward_bytes
from .components import OpenComponent, OpenComponents
from .dtypes import DTYPES
from .flux.adapters import LoraStack, applied, from_file
from .flux.compilation import Compilation
from .flux.compiled_forward import CompiledForward, CompiledShares
from .flux.fp8_products import own_bytes, use_fp8_products
from .flux.latents import from_tokens, to_inputs
from .flux.missing_guidance import allow_missing_guidance
from .flux.model import build_flux
from .flux.recording import CudaGraph
from .flux.recordings import Recordings
from .parallel.config import ParallelConfig
from .parallel.contexts import ParallelContext
from .parallel.kv_store import KvStore
from .parallel.peer_copies import PeerCopies
from .parallel.pipefusion import PipeFusion
from .parallel.process_group import RankGroup
from .parallel.transformer import FluxInputs, ParallelFlux
from .reservation import Reservation

_MOST_STACKS = 8
_MOST_RUNS = 16
_LONGEST_REASON = 200
_RUN_BYTES = 8 << 30  # of keys and values that PipeFusion keeps
_FP8_OPTIONS = "an fp8 file, which needs no copy, or products in the compute dtype"


@dataclass(frozen=True)
class DenoiserOptions:
    """What stays the same over all forwards of a job."""

    session: str
    region: str | None  # of the transformer
    compute: m.ComputeDtype
    fp8_matmul: bool = False
    degrees: m.Degrees | None = None
    adapters: Sequence[tuple[str | None, float]] = ()  # region and strength of each LoRA
    run: str = ""  # tells apart what a session denoises in turns
    reference_method: m.RefLatentsMethod = "offset"


@dataclass(frozen=True)
class Conditioning:
    """What a forward is conditioned by, besides the latent and the time; B rows each."""

    context: Tensor  # (B, T, E)
    y: Tensor | None  # (B, P)
    guidance: Tensor | None = None  # (B,), unscaled
    ref_latents: Sequence[Tensor] = field(default=())
    name: str = ""  # what it is known by, e.g. the digests of its bytes


class _Resident:
    """A transformer in one compute dtype."""

    def __init__(
        self,
        component: OpenComponent,
        compute: m.ComputeDtype,
        reservation: Reservation | None,
    ) -> None:
        """``reservation``: of the copies for products in fp8, if that is how it multiplies."""
        self.label = component.component.label
        self.compute: m.ComputeDtype = compute
        self.fp8_matmul = reservation is not None
        self.config: FluxConfig = component.build(
            "config", lambda: detect_flux(component.component.tensors, component.component.label)
        )
        tensors = component.without_prefix(self.config.prefix)
        loaded = build_flux(self.config, tensors, DTYPES[compute])
        self.fp8_bytes = 0  # of its own
        if reservation is not None:
            self.fp8_bytes = own_bytes(loaded.model)
            what = f"{self.label}'s weights in fp8"
            reservation.check_lasting(self.fp8_bytes, what, _FP8_OPTIONS)
            use_fp8_products(loaded.model)
        allow_missing_guidance(loaded.model)
        self.flux = ParallelFlux(loaded.model)
        self.casts = bool(loaded.cast_layers)
        # By ulysses degree where ranks share tokens, 0 where they do not; and whether with LoRA.
        self.compiled: dict[tuple[int, bool], CompiledForward] = {}
        self.pipefusion = PipeFusion(
            self.flux, KvStore(max_entries=_MOST_RUNS, max_bytes=_RUN_BYTES)
        )

    def tell(self, not_recorded: str | None) -> Iterator[m.TransformerStatus]:
        """How forwards without LoRA run, and those with, as far as there were any."""
        for lora in (False, True):
            ways = [forward for (_, branched), forward in self.compiled.items() if branched is lora]
            if not ways:
                continue
            most_telling = min((each.compilation for each in ways), key=_rank_by_state)
            yield m.TransformerStatus(
                label=self.label,
                compute=self.compute,
                fp8_matmul=self.fp8_matmul,
                lora=lora,
                state=most_telling.state,
                reason=most_telling.reason,
                recorded=sum(each.recorded for each in ways),
                not_recorded=not_recorded,
            )


class Denoiser:
    """All ranks of a group call :meth:`predict` with equal arguments, in the same order."""

    def __init__(
        self,
        group: RankGroup,
        components: OpenComponents,
        reservation: Reservation,
        *,
        compiles: bool,
        refusal: str | None = None,
    ) -> None:
        """``compiles``: whether blocks are compiled; ``refusal``: why they must not be."""
        self._group = group
        self._compiles = compiles
        self._refusal = refusal
        self._components = components
        self._reservation = reservation
        self._contexts: dict[ParallelConfig, ParallelContext] = {}
        self._stacks: OrderedDict[tuple[object, ...], LoraStack] = OrderedDict()
        self._no_copies: str | None = None
        self._recordings = Recordings(
            group, reservation, CudaGraph if group.backend == "nccl" else None
        )

    def config(self, options: DenoiserOptions) -> FluxConfig:
        """Of the job's transformer. Raises MissingComponent and UnsupportedModel."""
        return self._resident(options).config

    @torch.no_grad()
    def predict(
        self, options: DenoiserOptions, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """FLUX's prediction (B, C_out, H, W), in the compute dtype, on every rank.

        ``x`` is (B, C, H, W) and ``timestep`` (B,), sigmas from 0 to 1; on the rank's device.
        Raises ValueError for shapes or degrees that do not fit, OutOfMemory (on all ranks alike)
        before anything is computed, RuntimeError if another rank stays away.
        """
        resident = self._resident(options)
        stack = self._stack(options, resident.config)
        inputs, placement = to_inputs(
            resident.config,
            x,
            timestep,
            conditioning.context,
            conditioning.y,
            conditioning.guidance,
            conditioning.ref_latents,
            options.reference_method,
            compute_dtype=DTYPES[options.compute],
        )
        context = self._context(options, resident, inputs)
        nbytes = _activations(resident, inputs, context.config)
        reserve = partial(self._reserve, inputs, nbytes)
        with applied(resident.flux.model, stack):
            if context.config.pipefusion > 1:
                tokens = resident.pipefusion.step(
                    context,
                    inputs,
                    session=options.session,
                    slot=options.run,
                    condition=conditioning.name,
                    adapters=str(options.adapters),
                    reserve=reserve,
                ).output
            elif self._compiles:
                compiled = self._compiled(resident, context.config, branched=stack is not None)
                tokens = compiled.forward(context, inputs, stack, nbytes, partial(reserve, kept=0))
            else:
                reserve(kept=0)
                tokens = resident.flux.forward(context, inputs)
        return from_tokens(tokens, placement)

    def compile_piece(self) -> None:
        """Compile a piece of the first transformer that waits for it; no rank needs another."""
        for compiled in self._all_compiled():
            if compiled.compilation.next_piece:
                compiled.compile_piece()
                return

    def transformers(self) -> list[m.TransformerStatus]:
        """How forwards of each resident transformer run; none where nothing is ever compiled."""
        told = (
            status
            for resident in self._components.built(_Resident)
            for status in resident.tell(self._recordings.refusal)
        )
        return list(islice(told, limits.TRANSFORMERS))

    @property
    def by_nccl(self) -> str | None:
        """Why ranks exchange by NCCL, where copy engines should; as far as it is known yet."""
        reasons = (self._no_copies, *(context.no_copies for context in self._contexts.values()))
        return next((reason[:_LONGEST_REASON] for reason in reasons if reason), None)

    @property
    def copied_bytes(self) -> int:
        """Of weights that exist in fp8 besides those in their region."""
        return sum(resident.fp8_bytes for resident in self._components.built(_Resident))

    def forget_session(self, session: str) -> None:
        """Drop what an ended session left."""
        for resident in self._components.built(_Resident):
            resident.pipefusion.forget(session)

    def forget_run(self, options: DenoiserOptions) -> None:
        """Drop what a run that is over left."""
        for resident in self._components.built(_Resident):
            resident.pipefusion.forget(options.session, options.run)

    def forget_others(self, sessions: Container[str]) -> None:
        """Drop what is kept for all sessions but these; what goes on there begins exactly anew."""
        for resident in self._components.built(_Resident):
            resident.pipefusion.forget_others(sessions)
            resident.flux.rotations.forget()
        self._recordings.forget()
        for context in self._contexts.values():
            context.give_up()

    def forget_regions(self) -> None:
        """Regions are about to be closed: hold nothing of them."""
        self._stacks.clear()
        for compiled in self._all_compiled():
            compiled.forget_stack()
        self._recordings.forget()

    def _resident(self, options: DenoiserOptions) -> _Resident:
        component = self._components.find(options.region, "transformer")
        return component.build(
            ("flux", options.compute, options.fp8_matmul),
            lambda: _Resident(
                component,
                options.compute,
                self._reservation if options.fp8_matmul else None,
            ),
        )

    def _compiled(
        self, resident: _Resident, config: ParallelConfig, *, branched: bool
    ) -> CompiledForward:
        ways = config.ulysses if config.sequence > 1 else 0
        key = (ways, branched)
        if key not in resident.compiled:
            resident.compiled[key] = (
                CompiledShares(
                    resident.flux,
                    ways=ways,
                    branched=branched,
                    refusal=self._refusal,
                    recordings=self._recordings,
                )
                if ways
                else CompiledForward(resident.flux, branched=branched, refusal=self._refusal)
            )
        return resident.compiled[key]

    def _all_compiled(self) -> Iterator[CompiledForward]:
        for resident in self._components.built(_Resident):
            yield from resident.compiled.values()

    def _context(
        self, options: DenoiserOptions, resident: _Resident, inputs: FluxInputs
    ) -> ParallelContext:
        if options.degrees is None:
            config = choose_degrees(
                heads=resident.flux.heads,
                blocks=resident.flux.blocks,
                ranks=self._group.world_size,
                rows=inputs.hidden_states.shape[0],
                backend="nccl" if self._group.backend == "nccl" else "gloo",
                device_type="cuda" if self._group.device.type == "cuda" else "cpu",
            )
        else:
            given = options.degrees
            config = ParallelConfig(given.ulysses, given.ring, given.cfg, given.pipefusion)
            config.check_model(resident.flux.heads, resident.flux.blocks)
        if config not in self._contexts:
            self._contexts[config] = ParallelContext.build(config, self._group, self._make_copies)
        return self._contexts[config]

    def _make_copies(self, group: Any) -> PeerCopies | None:
        if self._group.backend != "nccl":
            return None  # several ranks on one device, or none
        patience = self._group.deadline / 4  # the rest of it is for the forward
        try:
            return PeerCopies.on_gpu(self._group.device, patience, group)
        except CudaUnavailable as error:
            self._no_copies = str(error)
            return None

    def _stack(self, options: DenoiserOptions, config: FluxConfig) -> LoraStack | None:
        if not options.adapters:
            return None
        key = (options.region, options.compute, *options.adapters)
        if key not in self._stacks:
            loras = []
            for region, strength in options.adapters:
                tensors = self._components.find(region, "lora").tensors
                if not _is_neutral(tensors):
                    tensors = from_file(tensors).tensors
                loras.append((tensors, strength))
            compute = DTYPES[options.compute]
            self._stacks[key] = LoraStack.build(config, loras, compute, self._group.device)
            if len(self._stacks) > _MOST_STACKS:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(key)
        stack = self._stacks[key]
        return stack if stack.branches else None

    def _reserve(self, inputs: FluxInputs, nbytes: int, kept: int) -> None:
        rows, image, _ = inputs.hidden_states.shape
        tokens = image + inputs.encoder_hidden_states.shape[1]
        what = f"{rows} x {tokens} tokens of a forward"
        self._reservation.check(nbytes + kept, what, lasting=kept)


def _activations(resident: _Resident, inputs: FluxInputs, degrees: ParallelConfig) -> int:
    rows, image, _ = inputs.hidden_states.shape
    return forward_bytes(
        resident.config,
        tokens_image=image,
        tokens_text=inputs.encoder_hidden_states.shape[1],
        rows=rows,
        degrees=degrees,
        compute_item_bytes=inputs.hidden_states.element_size(),
        cast_at_use=resident.casts,
    )


def _rank_by_state(compilation: Compilation) -> int:
    """Of several ways to share a forward, that which waits for an idle moment is told about."""
    return ("compiling", "refused", "compiled", "eager").index(compilation.state)


def _is_neutral(names: Iterable[str]) -> bool:
    """Whether a LoRA has the layout that :class:`.flux.adapters.LoraStack` reads."""
    return all(name.endswith((".down", ".up", ".alpha")) for name in names)
