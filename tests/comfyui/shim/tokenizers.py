"""Tokenizers are read once: each loader reads them again, for half of its CPU seconds."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def keep() -> None:
    """From here on, what is asked for again is the tokenizer that there is; none has a state."""
    kept: dict[str, Any] = {}
    original = PreTrainedTokenizerBase.from_pretrained.__func__

    def from_pretrained(cls: type, *arguments: Any, **others: Any) -> Any:
        key = repr((cls, arguments, sorted(others.items())))
        if key not in kept:
            kept[key] = original(cls, *arguments, **others)
        return kept[key]

    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)
