"""Headers of safetensors files: read as they are, or refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from weights_files import entry, memory_file, random_file, with_header
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import BadFile
from xdit_sidecar.protocol.manifest import check_manifest
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile

GOOD, _ = random_file({"a": ("F32", [2, 3]), "b": ("BF16", [5]), "empty": ("U8", [0, 4])})


def open_bytes(content: bytes) -> SafetensorsFile:
    descriptor = memory_file(content)
    try:
        return SafetensorsFile.from_descriptor(descriptor, "some.safetensors")
    finally:
        os.close(descriptor)


def test_reads_what_the_reference_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    tensors = {
        "weight": torch.randn(3, 4, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "none": torch.empty(0, 2),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    with SafetensorsFile.open(path) as file:
        assert file.label == "reference.safetensors"
        assert file.metadata == {"format": "pt"}
        assert {t.spec.name for t in file.tensors} == tensors.keys()
        positions = [t.position for t in file.tensors]
        assert positions == sorted(positions)
        for spec, position in file.tensors:
            source = tensors[spec.name]
            assert spec.shape == list(source.shape)
            expected = source.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[position : position + spec.nbytes] == expected


def test_keeps_a_descriptor_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, 3, os.SEEK_SET)
    with SafetensorsFile.from_descriptor(descriptor, "label") as file:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 3
        os.close(descriptor)
        file.check_unchanged()
        assert os.fstat(file.descriptor).st_size == len(GOOD)
    file.close()


def test_a_gap_and_another_order_than_the_header_are_fine() -> None:
    header = {"late": entry("U8", [2], 6, 8), "early": entry("U8", [3], 1, 4)}
    with open_bytes(with_header(header, bytes(range(8)))) as file:
        data = 8 + len(file.header)
        assert [(t.spec.name, t.position - data) for t in file.tensors] == [
            ("early", 1),
            ("late", 6),
        ]


def damaged(change: str, value: object) -> bytes:
    """A file with one tensor, one field of which is another."""
    return with_header({"a": {**entry("F32", [2], 0, 8), change: value}}, bytes(8))


HUGE = (limits.SAFETENSORS_HEADER + 1).to_bytes(8, "little") + b"{" + bytes(600)
TOO_MANY = {f"t{i}": entry("U8", [0], 0, 0) for i in range(limits.TENSORS + 1)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"\x10\0\0", "truncated after 3 bytes"),
        (GOOD[:8], "truncated after 8 bytes"),
        (GOOD[:50], "is truncated: its header ends at byte .* the file at byte 50"),
        (GOOD[:-1], "is truncated: tensor 'b' ends at byte .* the file at byte"),
        (HUGE, "announces a header of 100000001 bytes"),
        (b"GGUF\3\0\0\0" + bytes(500), "GGUF file: only .safetensors"),
        (b"PK\3\4" + bytes(500), "zip archive"),
        (b"\x80\2}q\0." + bytes(500), "pickled checkpoint .* could run code"),
        (b"\n <!DOCTYPE html><html>Log in</html>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b'{"error": "not found"}', "bare JSON"),
        (bytes(600), "no safetensors file .* 00 00"),
        (with_header(b"{"), "is no valid JSON"),
        (with_header(b'{"\xff": 1}'), "is no valid JSON"),
        (with_header(b'{"a": ' + b"[" * 100_000), "nested too deeply"),
        (with_header(b'{"a": 1' + b"0" * 5000 + b"}"), "is no valid JSON"),
        (with_header(b'{"a": {}, "a": {}}'), "'a' appears twice"),
        (with_header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' appears twice"),
        (with_header({"__metadata__": {"a": 1}}), "metadata that is not text"),
        (with_header({"__metadata__": "pt"}), "metadata that is not text"),
        (with_header({"a": 1}), "describes tensor 'a' wrongly"),
        (with_header({"a": {"dtype": "F32"}}), "describes tensor 'a' wrongly"),
        (with_header({"": entry("U8", [0], 0, 0)}), "name of 0 characters"),
        (with_header({"n" * 300: entry("U8", [0], 0, 0)}), "name of 300 characters"),
        (with_header(b'{"\\ud800": {}}'), "printable ASCII"),
        (with_header({"tab\t": entry("U8", [0], 0, 0)}), "printable ASCII"),
        (with_header(TOO_MANY), "8193 tensors, at most 8192"),
        (damaged("dtype", "F4"), "dtype 'F4'; supported are BOOL, U8"),
        (damaged("dtype", "X" * 999), "dtype 'XXX"),
        (damaged("shape", [3]), "bytes 0 to 8, its shape and dtype need 12"),
        (damaged("shape", [-2]), "describes tensor 'a' wrongly"),
        (damaged("shape", [1] * 9), "describes tensor 'a' wrongly"),
        (damaged("shape", [2**40] * 8), "its shape and dtype need"),
        (damaged("shape", [2.5]), "describes tensor 'a' wrongly"),
        (damaged("data_offsets", [0]), "describes tensor 'a' wrongly"),
        (damaged("data_offsets", [8, 0]), "bytes 8 to 0"),
        (damaged("data_offsets", [-8, 0]), "describes tensor 'a' wrongly"),
        (damaged("data_offsets", [2**70, 2**70 + 8]), "describes tensor 'a' wrongly"),
        (damaged("data_offsets", [2**41, 2**41 + 8]), "is truncated: tensor 'a'"),
        (
            with_header({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, bytes(8)),
            "lets tensors 'a' and 'b' overlap",
        ),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(content: bytes, told: str) -> None:
    with pytest.raises(BadFile) as caught:
        open_bytes(content)
    text = str(caught.value)
    assert re.search(told, text), text
    assert "some.safetensors" in text
    assert "\n" not in text
    assert len(text) < limits.TEXT


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, told in {
        "missing.safetensors": "does not exist",
        ".": "is a directory: name one .safetensors file",
        "pipe.safetensors": "is a device, pipe or socket",
        "pipe.safetensors/x": "cannot be opened: Not a directory",
        "a\0b": "cannot be opened: embedded null byte",
    }.items():
        with pytest.raises(BadFile, match=told):
            SafetensorsFile.open(f"{tmp_path}/{name}")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.safetensors"
    path.write_bytes(GOOD)
    path.chmod(0)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if os.geteuid() == 0:  # root may read everything
        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadFile, match="may not be read by uid"):
        SafetensorsFile.open(path)


def test_descriptors_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    descriptor = os.open(path, os.O_WRONLY)
    with pytest.raises(BadFile, match="cannot be read: Bad file descriptor"):
        SafetensorsFile.from_descriptor(descriptor, "write-only")
    os.close(descriptor)
    with pytest.raises(BadFile, match="cannot be used: Bad file descriptor"):
        SafetensorsFile.from_descriptor(10_000, "closed")


def check_opens_or_refuses(content: bytes) -> None:
    try:
        file = open_bytes(content)
    except BadFile as refusal:
        text = str(refusal)
    else:
        text = ""
    assert len(text) < limits.TEXT
    assert text.isprintable()
    if text:
        return
    with file:
        check_manifest([t.spec for t in file.tensors])
        for spec, position in file.tensors:
            assert 8 + len(file.header) <= position
            assert position + spec.nbytes <= len(content)
        assert sum(t.spec.nbytes for t in file.tensors) <= len(content)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "F16", "U8", "I64", "F4"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F4"]) | json_values,
        "shape": st.lists(st.integers(0, 5), max_size=4) | json_values,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | json_values,
    }
)


@given(st.binary(max_size=200))
def test_random_bytes(content: bytes) -> None:
    check_opens_or_refuses(content)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_random_headers(header: bytes, data: bytes) -> None:
    check_opens_or_refuses(with_header(b"{" + header, data))


@given(st.dictionaries(st.text(max_size=6), near_entries | json_values, max_size=5))
def test_headers_of_the_wrong_shape(header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    check_opens_or_refuses(with_header(text, bytes(40)))


@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    check_opens_or_refuses(bytes(content[: cut or None]))
