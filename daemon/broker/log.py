"""One line per event, as journald and grep like it: ``event key=value …``.

Values come from peers in part (labels, names), so that control characters are escaped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Literal

Fact = str | int | float | None

logger = logging.getLogger("xdit_sidecar")


def log(
    event: str,
    level: Literal["debug", "info", "warning", "error"] = "info",
    facts: Mapping[str, Fact] | None = None,
    **more: Fact,
) -> None:
    """Write one event. Never give it a handle or a token."""
    words = [event]
    words += [f"{key}={_render(value)}" for key, value in {**(facts or {}), **more}.items()]
    getattr(logger, level)(" ".join(words))


def _render(value: Fact) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, str):
        return str(value)
    return value if value.isidentifier() or value.isalnum() else json.dumps(value)
