"""From a prompt to the token ids that FLUX.1's text encoders take, as ComfyUI makes them.

The tokenizers' files are the user's own; nothing is downloaded. Prompts are plain text here:
ComfyUI's weights in parentheses and its embeddings are not looked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..protocol.errors import BadFile

CLIP_ROW = 77
T5_LEAST = 256
_NO_LIMIT = 1 << 30  # what a tokenizer would warn about is split into rows here
_WHAT_TO_DO = (
    "name the folder of ComfyUI (which has comfy/sd1_tokenizer and comfy/text_encoders/"
    "t5_tokenizer), or one with clip_l/ and t5/, or with tokenizer/ and tokenizer_2/"
)


class _Layout(NamedTuple):
    """Where a directory has both tokenizers."""

    clip_l: Path
    t5: Path


_LAYOUTS = (
    _Layout(Path("comfy/sd1_tokenizer"), Path("comfy/text_encoders/t5_tokenizer")),
    _Layout(Path("clip_l"), Path("t5")),
    _Layout(Path("tokenizer"), Path("tokenizer_2")),
)
# Either of these sets of files is a tokenizer.
_CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_T5_FILES = (("tokenizer.json",),)


class Tokenizers:
    """FLUX.1's two tokenizers. Numbers of special tokens are those of the tokenizers' own files."""

    def __init__(self, clip_l: Any, t5: Any, directory: Path) -> None:
        """Use :meth:`open`. Both are tokenizers of transformers."""
        self._clip_l, self._t5 = clip_l, t5
        empty = self._ids(clip_l, "")
        if len(empty) != 2:
            raise _unusable(directory, f"CLIP-L's puts {len(empty)} tokens around a prompt, not 2")
        self._start, self._end = empty
        empty = self._ids(t5, "")
        if len(empty) != 1:
            raise _unusable(directory, f"T5's puts {len(empty)} tokens behind a prompt, not 1")
        self._t5_end = empty[0]
        self._t5_pad = t5.pad_token_id
        if not isinstance(self._t5_pad, int):
            raise _unusable(directory, "T5's has no token for padding (pad_token)")

    @classmethod
    def open(cls, directory: Path) -> Tokenizers:
        """The tokenizers below ``directory``: ComfyUI's folder, or one that has both.

        Reads files only, never a hub. Raises BadFile, naming what is missing.
        """
        layout = _find_layout(directory)
        clip_folder, t5_folder = directory / layout.clip_l, directory / layout.t5
        _check_files(clip_folder, _CLIP_FILES)
        _check_files(t5_folder, _T5_FILES)
        # Here, not above: it takes a second, and the broker does without.
        import transformers

        kinds: Any = transformers  # its types do not know all that it has
        clip_l = _load(kinds.CLIPTokenizer, clip_folder)
        return cls(clip_l, _load(kinds.T5TokenizerFast, t5_folder), directory)

    def clip_l(self, text: str) -> list[list[int]]:
        """One or more rows of exactly 77 ids: start, up to 75 of the prompt, end, and end again as
        padding."""
        ids = self._ids(self._clip_l, text)[1:-1]
        room = CLIP_ROW - 2
        pieces = [ids[at : at + room] for at in range(0, len(ids), room)] or [[]]
        rows = ([self._start, *piece, self._end] for piece in pieces)
        return [row + [self._end] * (CLIP_ROW - len(row)) for row in rows]

    def t5(self, text: str, min_length: int = T5_LEAST) -> list[int]:
        """The whole prompt's ids and the end token, padded to at least ``min_length`` ids."""
        ids = [*self._ids(self._t5, text)[:-1], self._t5_end]
        return ids + [self._t5_pad] * (min_length - len(ids))

    @staticmethod
    def _ids(tokenizer: Any, text: str) -> list[int]:
        return [int(number) for number in tokenizer(text)["input_ids"]]


def _find_layout(directory: Path) -> _Layout:
    if not directory.is_dir():
        raise BadFile(f"no tokenizers: {str(directory)!r} is no folder; {_WHAT_TO_DO}")
    for layout in _LAYOUTS:
        if any((directory / folder).is_dir() for folder in layout):
            return layout
    raise BadFile(f"no tokenizers in {str(directory)!r}: {_WHAT_TO_DO}")


def _check_files(folder: Path, alternatives: tuple[tuple[str, ...], ...]) -> None:
    missing = [[name for name in names if not (folder / name).is_file()] for names in alternatives]
    if not all(missing):
        return
    # A set that is there in part is the one that was meant.
    pairs = zip(alternatives, missing, strict=True)
    begun = (lacking for names, lacking in pairs if len(lacking) < len(names))
    names = " and ".join(next(begun, missing[0]))
    raise BadFile(
        f"the tokenizer in {str(folder)!r} lacks {names}: copy it from where the rest came from, "
        f"or {_WHAT_TO_DO}"
    )


def _load(kind: Any, folder: Path) -> Any:
    try:
        # A folder that exists is never looked up on a hub; local_files_only says so outright.
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001  its parsers raise Exception itself
        reason = str(error).strip().partition("\n")[0][:160]
        raise BadFile(
            f"the tokenizer in {str(folder)!r} cannot be read ({reason}): copy its files again, or "
            f"{_WHAT_TO_DO}"
        ) from None
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


def _unusable(directory: Path, what: str) -> BadFile:
    return BadFile(f"the tokenizers in {str(directory)!r} are not FLUX.1's: {what}; {_WHAT_TO_DO}")
