"""Fingerprints: the same in every process, another one after any change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights_files import memory_file, random_file
from xdit_sidecar.protocol.errors import BadMessage
from xdit_sidecar.protocol.fingerprint import fingerprint_file, fingerprint_tensors
from xdit_sidecar.protocol.safetensors_file import FileIdentity, SafetensorsFile

CONTENT, _ = random_file({"a.x": ("F32", [2, 3]), "b.x": ("F16", [5])}, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def opened() -> Iterator[SafetensorsFile]:
    descriptor = memory_file(CONTENT)
    with SafetensorsFile.from_descriptor(descriptor, "x") as file:
        os.close(descriptor)
        yield file


identities = st.builds(FileIdentity, *[st.integers(-(2**63), 2**64) for _ in range(5)])
inputs = st.tuples(
    identities, st.binary(max_size=20), st.none() | st.text(max_size=3), st.text(max_size=3)
)


@given(first=inputs, second=inputs)
def test_files_differ_exactly_where_something_differs(
    opened: SafetensorsFile, first: tuple, second: tuple
) -> None:
    def fingerprint(given: tuple) -> str:
        opened.identity, opened.header, dtype, prefix = given
        return fingerprint_file(opened, dtype, prefix)

    assert (fingerprint(first) == fingerprint(second)) == (first == second)


@given(inputs, st.data())
def test_each_field_of_a_file_counts(
    opened: SafetensorsFile, given: tuple, data: st.DataObject
) -> None:
    opened.identity, opened.header, dtype, prefix = given
    before = fingerprint_file(opened, dtype, prefix)
    field = data.draw(st.sampled_from(FileIdentity._fields))
    changed = getattr(opened.identity, field) + data.draw(st.integers(1, 2**40))
    opened.identity = opened.identity._replace(**{field: changed})
    assert fingerprint_file(opened, dtype, prefix) != before


def test_real_files(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with SafetensorsFile.open(path) as file:
            return fingerprint_file(file)

    path = tmp_path / "a.safetensors"
    path.write_bytes(CONTENT)
    first = fingerprint(path)
    assert first.startswith("file:")
    assert len(first) == 5 + 64
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    assert fingerprint(link) == first == fingerprint(path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(CONTENT)
    assert fingerprint(copy) != first
    os.utime(path, ns=(0, 0))
    assert fingerprint(path) != first


def in_another_process(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_two_processes_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(CONTENT)
    code = """
import sys
import torch
from xdit_sidecar.protocol.fingerprint import fingerprint_file, fingerprint_tensors
from xdit_sidecar.protocol.safetensors_file import SafetensorsFile
with SafetensorsFile.open(sys.argv[1]) as file:
    print(fingerprint_file(file, "F16", "a."))
generator = torch.Generator().manual_seed(1)
print(fingerprint_tensors({"w": torch.randn(64, 8, generator=generator)}))
"""
    with SafetensorsFile.open(path) as file:
        expected = [fingerprint_file(file, "F16", "a.")]
    generator = torch.Generator().manual_seed(1)
    expected.append(fingerprint_tensors({"w": torch.randn(64, 8, generator=generator)}))
    assert in_another_process(code, path).splitlines() == expected


def test_every_property_of_tensors_counts() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2)
    variants = {
        "as it is": {"w": tensor},
        "one bit": {"w": torch.where(tensor == 23, tensor + 2**-19, tensor)},
        "name": {"v": tensor},
        "dtype": {"w": tensor.view(torch.int32)},
        "shape": {"w": tensor.reshape(2, 3, 4)},
        "layout": {"w": tensor.to(memory_format=torch.channels_last)},
        "one more": {"w": tensor, "empty": torch.empty(0)},
        "an empty one of another shape": {"w": tensor, "empty": torch.empty(0, 4)},
        "two": {"w": tensor, "x": tensor.clone()},
        "order": {"x": tensor.clone(), "w": tensor},
        "tied": {"w": tensor, "x": tensor},
        "split": {"w": tensor[:1], "x": tensor[1:]},
        "negative zero": {"w": torch.where(tensor == 0, -0.0, tensor)},
    }
    fingerprints = {name: fingerprint_tensors(tensors) for name, tensors in variants.items()}
    assert len(set(fingerprints.values())) == len(variants), fingerprints
    assert all(f.startswith("bytes:") and len(f) == 70 for f in fingerprints.values())


def test_what_does_not_count() -> None:
    tensor = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    first = fingerprint_tensors({"w": tensor})
    assert fingerprint_tensors({"w": tensor.clone()}) == first
    assert fingerprint_tensors({"w": torch.nn.Parameter(tensor)}) == first
    # A gap between the rows is not part of a region, so the layout is that of the plain tensor.
    padded = torch.zeros(5, 20)
    padded[:, :12] = tensor
    assert fingerprint_tensors({"w": padded[:, :12]}) == first
    with torch.inference_mode():
        assert fingerprint_tensors({"w": tensor.clone()}) == first


def test_large_and_odd_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randint(0, 255, (40, 30, 20), dtype=torch.uint8)
    tensors = {
        "flat": base,
        "transposed": base.permute(2, 0, 1),
        "every second": base[:, ::2],
        "scalar": torch.tensor(True),
        "fp8": torch.randn(9).to(torch.float8_e5m2),
        "bf16": torch.randn(9, 9).to(torch.bfloat16).t(),
        "broadcast": torch.tensor(1.5).expand(3, 4),
    }
    expected = fingerprint_tensors(tensors)
    # The pieces in which the bytes are read must not matter.
    monkeypatch.setattr("xdit_sidecar.protocol.fingerprint._PIECE", 64)
    assert fingerprint_tensors(tensors) == expected


def test_tensors_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(BadMessage, match="'w' is on meta"):
        fingerprint_tensors({"w": torch.empty(3, device="meta")})
    with pytest.raises(BadMessage, match="complex64"):
        fingerprint_tensors({"w": torch.zeros(3, dtype=torch.complex64)})
