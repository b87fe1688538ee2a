"""What kernels give against what torch gives, for many shapes. Run, it does so by an interpreter.

Usage: ``TRITON_INTERPRET=1 python kernel_cases.py DTYPE...``
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor
from xdit_sidecar.daemon.ranks.kernels import plain
from xdit_sidecar.daemon.ranks.kernels.plain import Projected

# Rows, text and image tokens, heads and their size, ranks; FLUX's own heads, and others.
ROTATED = [
    (1, 3, 6, 2, 8, 2),
    (2, 0, 5, 6, 24, 3),
    (2, 7, 9, 24, 128, 2),
    (1, 5, 4, 3, 128, 1),
    (1, 1, 1, 16, 16, 16),
    (3, 2, 17, 24, 128, 4),
    (1, 4, 0, 2, 64, 1),
]
# Rows, tokens, columns, and those before and behind.
ACTIVATED = [(1, 3, 7, 0, 0), (2, 5, 40, 30, 30), (1, 2, 5000, 8, 3), (3, 1, 2048, 64, 0)]
EPS = 1e-6
ROUNDINGS = 4


def check(kernels: ModuleType, device: str, dtype: torch.dtype) -> None:
    """AssertionError if a kernel gives something else."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for rows, text, image, heads, size, ways in ROTATED:
        streams = [
            Projected(
                3 * random(rows, count, heads * size).to(dtype), (1 + random(size) / 8).to(dtype)
            )
            for count in (text, image)
        ]
        if not text:  # as single blocks have it
            streams = streams[1:]
        angles = random(text + image, size)
        arguments = (streams, angles.cos(), angles.sin(), ways, EPS)
        case = f"{dtype}: {rows=} {text=} {image=} {heads=} {size=} {ways=}"
        same(kernels.rotate_heads(*arguments), plain.rotate_heads(*arguments), case)
    for rows, count, columns, before, behind in ACTIVATED:
        inner = 4 * random(rows, count, columns).to(dtype)
        special = torch.tensor([0.0, -0.0, 1e4, -1e4, float("inf"), float("nan")])
        inner.view(-1)[: len(special)] = special.to(inner)
        given, expected = (
            torch.full((rows, count, before + columns + behind), 7.0, dtype=dtype, device=device)
            for _ in range(2)
        )
        kernels.activate_into(given, inner, before)
        plain.activate_into(expected, inner, before)
        same(given, expected, f"{dtype}: {rows=} {count=} {columns=} {before=} {behind=}")


def same(given: Tensor, expected: Tensor, case: str) -> None:
    """Within a few roundings."""
    tolerance = ROUNDINGS * torch.finfo(expected.dtype).eps
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    near = torch.isclose(
        given.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    wrong = given[~near][:3].tolist(), expected[~near][:3].tolist()
    assert near.all(), f"{case}: {int((~near).sum())} of {near.numel()}, as {wrong}"


if __name__ == "__main__":
    from xdit_sidecar.daemon.ranks.kernels import triton_kernels

    for name in sys.argv[1:]:
        check(triton_kernels, "cpu", getattr(torch, name))
        print(name, "agrees")
