"""Sizes and times as people read them."""

from __future__ import annotations

_STEP = 1024.0


def human_bytes(nbytes: float) -> str:
    """Three digits or so: "512 B", "2 MiB", "7.96 GiB", "-3.2 MiB"."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < _STEP:
            break
        size, unit = size / _STEP, larger
    return f"{size:.0f} {unit}" if abs(size) >= 100 else f"{size:.3g} {unit}"


def human_ms(seconds: float) -> str:
    """Milliseconds: "0.31 ms", "12 ms"."""
    return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def human_age(seconds: float) -> str:
    """The largest unit that fits: "42 s", "12 min", "3.5 h", "2.1 d"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"
