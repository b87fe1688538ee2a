"""Safetensors files for tests, whole and broken, written without the package under test."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I64": 8}


def with_header(header: object, data: bytes = b"") -> bytes:
    """A file with this header: an object that becomes JSON, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor as a header describes it."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_file(
    shapes: Mapping[str, tuple[str, list[int]]],
    *,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, bytes]]:
    """A file of random tensors (name → dtype and shape), and the bytes of each."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data, tensors = b"", {}
    random = Random(seed)
    for name, (dtype, shape) in shapes.items():
        nbytes = ITEM_BYTES[dtype]
        for size in shape:
            nbytes *= size
        tensors[name] = random.randbytes(nbytes)
        header[name] = entry(dtype, shape, len(data), len(data) + nbytes)
        data += tensors[name]
    return with_header(header, data), tensors


def memory_file(content: bytes) -> int:
    """A descriptor of a file that has no name."""
    descriptor = os.memfd_create("test-weights")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    return descriptor


def large_file(path: Path, mebibytes: int, tensors: int = 8) -> int:
    """Write a file of F32 tensors that are together so large; their bytes."""
    rows = mebibytes * 1024 // tensors
    shapes = {f"layer.{i}.weight": ("F32", [rows, 256]) for i in range(tensors)}
    content, _ = random_file(shapes, seed=mebibytes)
    path.write_bytes(content)
    return rows * 1024 * tensors
