"""A tiny transformer whose blocks are compiled by compilers that are quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flux_files
import lora_files
import torch
from flux_files import Flux
from flux_inputs import comfy_inputs
from torch import Tensor
from torch._dynamo.utils import counters
from xdit_sidecar.daemon.ranks.flux.adapters import LoraStack, applied
from xdit_sidecar.daemon.ranks.flux.compiled_forward import Asked, CompiledForward
from xdit_sidecar.daemon.ranks.flux.latents import to_inputs
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.daemon.ranks.parallel.attention import Exchange
from xdit_sidecar.daemon.ranks.parallel.config import ParallelConfig
from xdit_sidecar.daemon.ranks.parallel.transformer import FluxInputs, ParallelFlux
from xdit_sidecar.daemon.ranks.parallel.xfuser_repairs import load_xfuser

FLUX = Flux(heads=4, double=2, single=2)
WEIGHTS = flux_files.random_weights(FLUX)
CONFIG = flux_files.detect({name: ("F32", tuple(t.shape)) for name, t in WEIGHTS.items()})


class Scene:
    """The transformer, and what it computes."""

    exchange: Exchange | None = None

    def __init__(
        self,
        backend: str | Callable[..., Any],
        device: str = "cpu",
        *,
        branched: bool = False,
        weights: Mapping[str, Tensor] = WEIGHTS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        load_xfuser(torch.device(device))
        # Code is kept by function, so another test's would be found.
        torch.compiler.reset()
        counters.clear()
        there = {name: tensor.to(device) for name, tensor in weights.items()}
        self.flux = ParallelFlux(build_flux(CONFIG, there, dtype).model)
        self.forward = CompiledForward(self.flux, branched=branched, backend=backend)

    @property
    def graphs(self) -> int:
        """How many pieces of code were made."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def state(self) -> str:
        return self.forward.compilation.state

    @torch.no_grad()
    def compute(
        self,
        inputs: FluxInputs,
        stack: LoraStack | None = None,
        forward: CompiledForward | None = None,
    ) -> Tensor:
        """As a group of one rank would; by another ``forward`` of the same transformer."""
        with applied(self.flux.model, stack):
            return (forward or self.forward)._serve(self.asked(stack), inputs, self.exchange)

    def asked(self, stack: LoraStack | None) -> Asked:
        """How forwards are asked for."""
        return Asked(ParallelConfig(), stack)

    @torch.no_grad()
    def compile(self, forward: CompiledForward | None = None) -> None:
        """Everything that waits for it."""
        forward = forward or self.forward
        while forward.compilation.next_piece is not None:
            forward.compile_piece()


def inputs(
    height: int = 12,
    width: int = 10,
    text: int = 9,
    rows: int = 1,
    device: str = "cpu",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> FluxInputs:
    given = comfy_inputs(
        FLUX, height=height, width=width, text=text, batch=rows, seed=seed, dtype=dtype
    )
    on_device = {name: tensor.to(device) for name, tensor in given.items()}
    return to_inputs(CONFIG, **on_device, compute_dtype=dtype)[0]  # type: ignore[arg-type]


def stack_of(
    *seeds: int, only: str = "", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LoraStack:
    """A LoRA for each seed, for modules whose names begin with ``only``."""
    loras = [
        ({n: t for n, t in lora_files.neutral(FLUX, seed).items() if n.startswith(only)}, 1.0)
        for seed in seeds
    ]
    return LoraStack.build(CONFIG, loras, dtype, device)
