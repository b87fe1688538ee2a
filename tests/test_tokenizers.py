"""Token ids are those of ComfyUI's own FLUX.1 tokenizer; small tokenizers of other numbers work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_checkout import comfyui
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from xdit_sidecar.daemon.tokenizers import CLIP_ROW, T5_LEAST, Tokenizers
from xdit_sidecar.protocol.errors import BadFile

PROGRAM = Path(__file__).with_name("comfy_tokens.py")
PROMPTS = [
    "",
    " ",
    "a photo of a cat",
    "  two  spaces,\nnew lines\tand tabs  ",
    "a (very:1.3) ((bright)) [dull] painting (of (a) sea",
    "UPPER and lower, it's don't 3.14 #1 50% @home <lora:x:1>",
    "die Straße, naïve café, 東京の夜, Москва, 🦊🌲, e\u0301, \u00a0, \ufb01",
    "word " * 73,
    "word " * 74 + "end",
    "word " * 75,
    "word " * 76,
    "a red fox in deep snow under tall pines, " * 9,
    "a red fox in deep snow under tall pines, " * 60,
    "word " * 254,
    "word " * 255,
    "word " * 256,
    "supercalifragilisticexpialidocious" * 12,
    "<|endoftext|> and </s> and <pad> in a prompt",
]
NO_NETWORK = """
import socket

def forbidden(*arguments, **options):
    raise AssertionError("a socket was used")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, forbidden)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, forbidden)
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ids_are_those_of_comfyui(tmp_path: Path) -> None:
    folder = comfyui()
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    expected = json.loads(run(str(PROGRAM), str(folder), str(prompts)))
    own = Tokenizers.open(folder)
    for text, (clip_l, t5) in zip(PROMPTS, expected, strict=True):
        assert own.clip_l(text) == clip_l, text
        assert own.t5(text) == t5, text
    # The prompts do reach what is special about long ones.
    assert max(len(clip_l) for clip_l, _ in expected) > 3
    assert {len(t5) for _, t5 in expected} > {T5_LEAST}


def test_published_numbers() -> None:
    own = Tokenizers.open(comfyui())
    assert own.clip_l("") == [[49406, *[49407] * 76]]
    assert own.t5("") == [1, *[0] * 255]
    assert own.t5("", min_length=3) == [1, 0, 0]
    assert own.t5("", min_length=0) == [1]


# --- small tokenizers


def write_small(
    directory: Path, clip: str = "clip_l", t5: str = "t5", *, settings: bool = True
) -> Path:
    """Tokenizers of a few letters, whose special tokens have other numbers than FLUX.1's."""
    letters = {letter: number for number, letter in enumerate("abc ")}
    (directory / clip).mkdir(parents=True)
    words = {**letters, "a</w>": 4, "b</w>": 5, "c</w>": 6, "ab</w>": 7}
    words |= {"<|startoftext|>": 8, "<|endoftext|>": 9}
    (directory / clip / "vocab.json").write_text(json.dumps(words))
    (directory / clip / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (directory / t5).mkdir(parents=True)
    pieces = Tokenizer(
        models.Unigram([("<pad>", 0.0), ("?", -9.0), ("▁a", -1.0), ("b", -2.0), ("</s>", 0.0)], 1)
    )
    pieces.normalizer = normalizers.NFKC()
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 4)]
    )
    pieces.save(str(directory / t5 / "tokenizer.json"))
    if settings:
        special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "?"}
        (directory / t5 / "tokenizer_config.json").write_text(json.dumps(special))
        special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        special["bos_token"] = "<|startoftext|>"
        (directory / clip / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


@pytest.mark.parametrize(
    ("clip", "t5"),
    [
        ("clip_l", "t5"),
        ("tokenizer", "tokenizer_2"),
        ("comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer"),
    ],
)
def test_special_tokens_are_read_from_the_files(tmp_path: Path, clip: str, t5: str) -> None:
    own = Tokenizers.open(write_small(tmp_path, clip, t5))
    assert own.clip_l("ab A") == [[8, 7, 4, *[9] * 74]]
    rows = own.clip_l("a " * 151)
    assert [row[1:-1] for row in rows[:2]] == [[4] * 75] * 2
    assert rows[2] == [8, 4, *[9] * 75]
    assert all(len(row) == CLIP_ROW and row[0] == 8 and row[-1] == 9 for row in rows)
    assert own.t5("ab a", min_length=6) == [2, 3, 2, 4, 0, 0]
    assert len(own.t5("a " * 400)) == 401


def test_no_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With it, the hub would not be asked anyway.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    write_small(tmp_path / "whole")
    write_small(tmp_path / "bare", settings=False)
    broken = write_small(tmp_path / "broken")
    (broken / "t5" / "tokenizer.json").write_text("{}")
    code = f"""{NO_NETWORK}
import sys
from pathlib import Path
from xdit_sidecar.daemon.tokenizers import Tokenizers
from xdit_sidecar.protocol.errors import BadFile
assert "transformers" not in sys.modules
for folder in ("whole", "bare"):
    Tokenizers.open(Path({str(tmp_path)!r}, folder)).t5("a")
try:
    Tokenizers.open(Path({str(broken)!r}))
except BadFile as error:
    assert "cannot be read" in str(error)
    assert "socket" not in str(error)
else:
    sys.exit("a broken tokenizer was opened")
assert "torch" not in sys.modules
print("done")
"""
    assert run("-c", code).strip() == "done"


# --- what is missing is named


def refusal(directory: Path) -> str:
    with pytest.raises(BadFile) as caught:
        Tokenizers.open(directory)
    text = str(caught.value)
    assert "\n" not in text
    assert "name the folder of ComfyUI" in text
    return text


def test_a_folder_without_tokenizers(tmp_path: Path) -> None:
    assert f"no tokenizers in '{tmp_path}'" in refusal(tmp_path)
    assert "is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is no folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("clip_l/vocab.json", "clip_l' lacks vocab.json"),
        ("clip_l/merges.txt", "clip_l' lacks merges.txt"),
        ("t5/tokenizer.json", "t5' lacks tokenizer.json"),
        ("t5", "t5' lacks tokenizer.json"),
        ("clip_l", "clip_l' lacks tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str, problem: str) -> None:
    gone = write_small(tmp_path) / file
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize("file", ["clip_l/vocab.json", "clip_l/merges.txt", "t5/tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_damaged_file_is_refused(tmp_path: Path, file: str, content: bytes) -> None:
    if file.endswith("merges.txt"):
        content = b"one two three\n" + content
    (write_small(tmp_path) / file).write_bytes(content)
    refusal(tmp_path)


class OwnNumbers:
    """Stands for a tokenizer of another model."""

    def __init__(self, *around: int, pad: int | None = 0) -> None:
        self.around = [*around]
        self.pad_token_id = pad

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.around}


@pytest.mark.parametrize(
    ("clip_l", "t5", "problem"),
    [
        (OwnNumbers(1), OwnNumbers(1), "CLIP-L's puts 1 tokens around a prompt, not 2"),
        (OwnNumbers(1, 2), OwnNumbers(), "T5's puts 0 tokens behind a prompt, not 1"),
        (OwnNumbers(1, 2), OwnNumbers(3, pad=None), "T5's has no token for padding (pad_token)"),
    ],
)
def test_tokenizers_of_another_model_are_refused(
    tmp_path: Path, clip_l: OwnNumbers, t5: OwnNumbers, problem: str
) -> None:
    with pytest.raises(BadFile) as caught:
        Tokenizers(clip_l, t5, tmp_path)
    assert problem in str(caught.value)
