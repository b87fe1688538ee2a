"""The demo model that draws digits: its files, its prompts, and pictures of them by the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from digits.files import FILES, MODELS, TOKENIZERS
from digits.pictures import SIDE, Reader
from digits.words import prompt
from flux_inputs import Inputs
from picture_scene import Drawer, negative
from xdit_sidecar.daemon.tokenizers import Tokenizers

STEPS = 4
CFG = 1.5
# Where nothing is drawn but noise, a tenth of the pictures is read rightly; with any of the faults
# in meaning/test_faults.py a third at most. Seeds are fixed: only rounding can change a count.
RIGHT = 0.9  # at least
BROKEN = 0.6  # at most
# Pictures in `make test`; the soak has 20 and 100. Where a third is right, nine of ten are by
# chance less than once in a thousand cases.
FEW = 10


@dataclass
class DigitsFiles:
    """What `picture_scene.drawing` has resident; ``transformer`` may be another file."""

    transformer: Path = FILES["transformer"]
    paths: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.paths = {**FILES, "transformer": self.transformer}


@cache
def tokenizers() -> Tokenizers:
    """Those that come with the files."""
    return Tokenizers.open(MODELS / TOKENIZERS)


@cache
def reader() -> Reader:
    """The classifier that has seen the real digits only."""
    return Reader()


def token_ids(prompts: Sequence[str]) -> Inputs:
    """A row for each prompt."""
    own = tokenizers()
    return {
        "clip_l_ids": torch.tensor([own.clip_l(text)[0] for text in prompts]),
        "t5_ids": torch.tensor([own.t5(text) for text in prompts]),
    }


@dataclass(frozen=True)
class Request:
    """Pictures of every digit in turn, by one seed."""

    count: int = FEW
    seed: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digits(self) -> list[int]:
        return [number % 10 for number in range(self.count)]

    def draw(self, drawer: Drawer) -> torch.Tensor:
        """Pictures (count, 64, 64, 3) by the ranks."""
        tokens = token_ids([prompt(digit) for digit in self.digits])
        job = {"seed": self.seed, "steps": STEPS, "width": SIDE, "height": SIDE, **self.settings}
        if job.get("cfg", 1.0) != 1.0:
            tokens |= negative(token_ids([""] * self.count))
        return drawer.draw(tokens, batch=self.count, timeout=120, **job)["image"]

    def count_right(self, drawer: Drawer) -> int:
        """How many pictures show what was asked for."""
        return self.count_read(self.draw(drawer))

    def count_read(self, pictures: torch.Tensor) -> int:
        """The same of pictures that are drawn already."""
        return reader().count_right(pictures, self.digits)
