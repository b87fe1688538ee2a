"""Which noise levels a FLUX.1 run goes through.

A sigma is the share of noise in the latent, 1 to 0. The shift to higher levels is Black Forest
Labs' (``time_shift`` in github.com/black-forest-labs/flux); which of the levels a schedule takes is
ComfyUI 0.3.75's choice, to the last bit: it keeps a table of them and counts in its entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ComfyUI takes these for every picture size; its ModelSamplingFlux node gives other ones.
DEV_MU = 1.15
SCHNELL_SHIFT = 1.0

_MOST_STEPS = 10_000  # the table of `mu` has no more
_LARGEST_MU = 80  # e^mu is an fp32
_NEARLY_ZERO = 1e-5


@dataclass(frozen=True)
class NoiseLevels:
    """All levels of one model: ``levels`` (fp32, rising), and the shift that made them."""

    levels: Tensor
    shift: Callable[[Tensor], Tensor]

    @classmethod
    def of_mu(cls, mu: float) -> NoiseLevels:
        """FLUX.1 dev and all that have its guidance: e^mu / (e^mu + 1/t - 1)."""

        def shift(time: Tensor) -> Tensor:
            return math.exp(mu) / (math.exp(mu) + (1 / time - 1))

        return cls(shift(torch.arange(1, 10_001) / 10_000), shift)

    @classmethod
    def of_shift(cls, factor: float) -> NoiseLevels:
        """FLUX.1 schnell: factor·t / (1 + (factor - 1)·t)."""

        def shift(time: Tensor) -> Tensor:
            return time if factor == 1 else factor * time / (1 + (factor - 1) * time)

        return cls(shift(torch.arange(1, 1_001) / 1_000), shift)


def flux_sigmas(
    steps: int,
    *,
    mu: float | None = None,
    shift: float | None = None,
    scheduler: str = "simple",
    denoise: float = 1.0,
) -> Tensor:
    """The sigmas of a run, falling to 0: fp32 [steps + 1] on the CPU.

    ``mu`` (for models with guidance, by default 1.15) or ``shift`` (for schnell, 1.0), not both.
    ``scheduler`` is one of :data:`SCHEDULERS`. With ``denoise`` below 1 the steps are the last of a
    longer run, so that the first sigma is lower; 0 or less gives an empty tensor: nothing is to be
    done.

    Raises ValueError for numbers or a scheduler that there cannot be.
    """
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"steps={steps!r}: use a whole number from 1 to {_MOST_STEPS}")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler {scheduler!r} is unknown; use one of: {', '.join(SCHEDULERS)}")
    if mu is not None and shift is not None:
        raise ValueError(f"mu={mu} and shift={shift}: give one of them, mu for dev")
    if not math.isfinite(denoise):
        raise ValueError(f"denoise={denoise}: use a number from 0 to 1")
    if mu is not None and not abs(mu) <= _LARGEST_MU:
        raise ValueError(
            f"mu={mu}: use a number from -{_LARGEST_MU} to {_LARGEST_MU}; dev has {DEV_MU}"
        )
    if shift is not None and not 0 < shift < math.inf:
        raise ValueError(f"shift={shift}: use a number above 0; schnell has {SCHNELL_SHIFT}")
    if denoise <= 0:
        return torch.empty(0)
    if shift is not None:
        levels = NoiseLevels.of_shift(shift)
    else:
        levels = NoiseLevels.of_mu(DEV_MU if mu is None else mu)
    if denoise > 0.9999:
        return SCHEDULERS[scheduler](levels, steps)
    whole = int(steps / denoise)
    if whole > _MOST_STEPS:
        raise ValueError(
            f"denoise={denoise} with {steps} steps: the whole run would have {whole} steps and may "
            f"have {_MOST_STEPS}; raise denoise"
        )
    return SCHEDULERS[scheduler](levels, whole)[-(steps + 1) :]


def _simple(levels: NoiseLevels, steps: int) -> Tensor:
    """Evenly spaced entries of the table, from the highest."""
    table = levels.levels
    stride = len(table) / steps
    taken = [table[-(1 + int(step * stride))].item() for step in range(steps)]
    return torch.tensor([*taken, 0.0])


def _normal(levels: NoiseLevels, steps: int) -> Tensor:
    """Evenly spaced times from the highest level to the lowest, both of which are levels already
    and are shifted once more."""
    first, last = levels.levels[-1], levels.levels[0]
    ends_at_zero = levels.shift(last).item() <= _NEARLY_ZERO
    times = torch.linspace(first.item(), last.item(), steps + 1 if ends_at_zero else steps)
    taken = [levels.shift(time).item() for time in times]
    return torch.tensor(taken if ends_at_zero else [*taken, 0.0])


def _sgm_uniform(levels: NoiseLevels, steps: int) -> Tensor:
    """As normal, one step finer, without the lowest."""
    first, last = levels.levels[-1], levels.levels[0]
    times = torch.linspace(first.item(), last.item(), steps + 1)[:-1]
    return torch.tensor([*(levels.shift(time).item() for time in times), 0.0])


SCHEDULERS: dict[str, Callable[[NoiseLevels, int], Tensor]] = {
    "simple": _simple,
    "normal": _normal,
    "sgm_uniform": _sgm_uniform,
}
