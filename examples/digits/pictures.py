"""scikit-learn's handwritten digits as pictures, and pictures read as digits again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 64  # pixels of a picture; the data have 8
_CELLS = 8
_INK = 16.0  # the darkest value in the data


def real_digits() -> tuple[Tensor, Tensor]:
    """1797 digits: ink (N, 8, 8) from 0 to 16, and what each of them is (N,)."""
    # Here, not above: who draws does without.
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)


def to_pictures(ink: Tensor) -> Tensor:
    """Ink (N, 8, 8) to pictures (N, 64, 64, 3) from 0 to 1, dark on white."""
    size = (SIDE, SIDE)
    large = functional.interpolate(ink[:, None] / _INK, size, mode="bicubic", antialias=False)
    return (1 - large.clamp(0, 1)).expand(-1, 3, -1, -1).movedim(1, 3).contiguous()


def to_ink(pictures: Tensor) -> Tensor:
    """The way back, (N, H, W, 3) to (N, 8, 8)."""
    grey = pictures.float().mean(3)[:, None]
    return _INK * (1 - functional.interpolate(grey, (_CELLS, _CELLS), mode="area")[:, 0])


class Reader:
    """A classifier of scikit-learn, fitted on the real digits."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        ink, self._labels = real_digits()
        # As large pictures and back: that takes some sharpness, also from what it is to read.
        self._ink = to_ink(to_pictures(ink))
        self._svc = SVC(C=10.0, gamma=0.001).fit(self._ink.flatten(1).numpy(), self._labels)

    def read(self, pictures: Tensor) -> list[int]:
        """Which digit each of (N, H, W, 3) shows."""
        return [int(digit) for digit in self._svc.predict(to_ink(pictures).flatten(1).numpy())]

    def count_right(self, pictures: Tensor, digits: list[int]) -> int:
        """How many of the pictures show the digit that they should."""
        return sum(a == b for a, b in zip(self.read(pictures), digits, strict=True))
