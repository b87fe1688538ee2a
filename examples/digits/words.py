"""The words of the prompts, and tokenizers that know no others.

Token numbers are those of CLIP's and T5's own tokenizers, so that ComfyUI's give the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = (
    "a handwritten {}",
    "{}",
    "the digit {}",
    "the number {}",
    "a picture of the handwritten digit {}",
    "a drawing of the number {}",
)

CLIP_VOCABULARY = 49408
T5_VOCABULARY = 32128
_CLIP_START, _CLIP_END = 49406, 49407
_T5_UNKNOWN, _T5_SPACE = 2, 3


class _Word(NamedTuple):
    """CLIP's one token, and T5's pieces."""

    clip: int
    t5: tuple[tuple[str, int], ...]


_SPACE = ("▁", _T5_SPACE)
_WORDS = {
    "a": _Word(320, (_SPACE, ("a", 9))),
    "the": _Word(518, (("▁the", 8),)),
    "handwritten": _Word(35192, (("▁hand", 609), ("written", 14973))),
    "number": _Word(2842, (("▁number", 381),)),
    "digit": _Word(27472, (_SPACE, ("digit", 9206))),
    "picture": _Word(1674, (("▁picture", 1554),)),
    "drawing": _Word(3610, (("▁drawing", 5364),)),
    "of": _Word(539, (("▁of", 13),)),
    "zero": _Word(5848, (("▁zero", 5733),)),
    "one": _Word(637, (("▁one", 80),)),
    "two": _Word(1237, (("▁two", 192),)),
    "three": _Word(2097, (("▁three", 386),)),
    "four": _Word(2721, (("▁four", 662),)),
    "five": _Word(3127, (("▁five", 874),)),
    "six": _Word(4093, (("▁six", 1296),)),
    "seven": _Word(5757, (("▁seven", 2391),)),
    "eight": _Word(7910, (("▁eight", 2641),)),
    "nine": _Word(7330, (("▁nine", 4169),)),
}


def prompt(digit: int, form: int = 0) -> str:
    """What to ask for, such as "a handwritten seven"."""
    return PROMPTS[form].format(DIGITS[digit])


def write_tokenizers(directory: Path) -> None:
    """``clip_l/`` and ``t5/``, as `xdit-sidecar generate --tokenizers` takes them."""
    _write_clip(directory / "clip_l")
    _write_t5(directory / "t5")


def _write_clip(directory: Path) -> None:
    vocabulary = {"<|startoftext|>": _CLIP_START, "<|endoftext|>": _CLIP_END}
    merges: dict[str, None] = {}
    # CLIP's real tables, as far as these words need any: numbers of what lies between are free.
    letters = sorted({letter for word in _WORDS for letter in word})
    between = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word, numbers in _WORDS.items():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for length in range(2, len(parts) + 1):
            merges[f"{''.join(parts[: length - 1])} {parts[length - 1]}"] = None
            between.append("".join(parts[:length]))
        vocabulary["".join(parts)] = numbers.clip
    free = iter(set(range(CLIP_VOCABULARY)) - set(vocabulary.values()))
    for part in between:
        if part not in vocabulary:
            vocabulary[part] = next(free)
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    _write_json(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {**special, "bos_token": "<|startoftext|>", "tokenizer_class": "CLIPTokenizer"}
    _write_json(directory / "tokenizer_config.json", settings)


def _write_t5(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    # A list whose places are the numbers; what is not needed gets names that nobody writes.
    pieces = [(f"\ue000{number}", -100.0) for number in range(T5_VOCABULARY - 28)]
    pieces[:_T5_SPACE] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    for word in _WORDS.values():
        for text, number in word.t5:
            pieces[number] = (text, -2.0 if text == "▁" else -3.0)
    tokenizer = Tokenizer(models.Unigram(pieces, _T5_UNKNOWN, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    _write_json(
        directory / "tokenizer_config.json", {**special, "tokenizer_class": "T5TokenizerFast"}
    )


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
