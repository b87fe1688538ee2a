"""Kernels in Triton give what torch gives; where they do not, or cannot run, they are not used."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import kernel_cases
from triton_for_tests import triton_folder
from xdit_sidecar.daemon.ranks.kernels import finding, plain
from xdit_sidecar.daemon.ranks.kernels.joined_mlp import activate_into, make_room
from xdit_sidecar.daemon.ranks.kernels.plain import Projected
from xdit_sidecar.daemon.ranks.kernels.rotated_heads import rotate_heads

CPU = torch.device("cpu")
KERNELS = "xdit_sidecar.daemon.ranks.kernels.triton_kernels"
OPERATORS = torch.ops.xdit_sidecar


@pytest.fixture(autouse=True)
def _found_anew() -> Iterator[None]:
    yield
    finding._find.cache_clear()


@pytest.mark.timeout(300)
def test_kernels_give_what_torch_gives() -> None:
    """By Triton's interpreter, which cuts bf16 where hardware rounds it."""
    program = Path(kernel_cases.__file__)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(triton_folder()), *sys.path]),
    }
    dtypes = ["float32", "float16"]
    answer = subprocess.run(
        [sys.executable, str(program), *dtypes],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == [f"{dtype} agrees" for dtype in dtypes]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_give_what_torch_gives_on_a_gpu(dtype: torch.dtype) -> None:
    found = finding.find_kernels(torch.empty(0, dtype=dtype, device="cuda"))
    assert found is importlib.import_module(KERNELS)
    kernel_cases.check(found, "cuda", dtype)


def without_last_head(streams: list[Projected], *arguments: Any) -> torch.Tensor:
    packed = plain.rotate_heads(streams, *arguments)
    packed[-1, ..., -1, :] = 0
    return packed


def one_column_off(joined: torch.Tensor, inner: torch.Tensor, start: int) -> None:
    plain.activate_into(joined, inner, start + 1)


def fail(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("no C compiler:\n  none at all")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"rotate_heads": without_last_head}, "something else than torch does"),
        ({"activate_into": one_column_off}, "something else than torch does"),
        ({"rotate_heads": fail}, "no C compiler: none at all"),
        (None, "triton"),
        ({}, ""),
    ],
    ids=["heads", "columns", "raises", "missing", "none"],
)
def test_what_does_not_work_is_not_used(
    fault: dict[str, Any] | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if fault is None:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    else:
        kernels = SimpleNamespace(**{**vars(plain), **fault})
        monkeypatch.setitem(sys.modules, KERNELS, kernels)
    found = [finding._find(CPU, torch.float32) for _ in range(3)]
    lines = capfd.readouterr().err.splitlines()
    if told:
        assert found == [None] * 3
        assert len(lines) == 1, "said once"
        assert told in lines[0]
        assert "torch.float32" in lines[0]
    else:
        assert found == [kernels] * 3
        assert not lines


def test_code_that_others_may_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (cache := tmp_path / "cache").mkdir(mode=0o777)
    cache.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    monkeypatch.setitem(sys.modules, KERNELS, plain)
    assert finding._find(CPU, torch.float32) is None
    assert "cannot be kept safely" in capfd.readouterr().err


def test_operators_are_described_as_they_are() -> None:
    heads, size, ways = 4, 8, 2
    image, text = (
        Projected(torch.randn(2, count, heads * size), torch.ones(size)) for count in (5, 3)
    )
    angles = torch.randn(8, size)
    rotation = angles.cos(), angles.sin()
    checks = ("test_schema", "test_faketensor")
    arguments = (*image, *text, *rotation, ways, 1e-6)
    torch.library.opcheck(OPERATORS.rotate_heads.default, arguments, test_utils=checks)
    attention = torch.randn(2, heads, 5, size).transpose(1, 2)
    torch.library.opcheck(OPERATORS.make_room.default, (attention, 16), test_utils=checks[1])
    joined = torch.zeros(2, 5, heads * size + 16)
    arguments = (joined, torch.randn(2, 5, 16), heads * size)
    torch.library.opcheck(OPERATORS.activate_into.default, arguments, test_utils=checks)

    expected = plain.rotate_heads([text, image], *rotation, ways, 1e-6)
    assert torch.equal(rotate_heads(image, text, rotation, ways, 1e-6), expected)
    room = make_room(attention, 16)
    activate_into(room, arguments[1], heads * size)
    gelu = torch.nn.functional.gelu(arguments[1], approximate="tanh")
    assert torch.equal(room, torch.cat([attention.flatten(2), gelu], dim=2))
    assert torch.equal(make_room(attention, 0), attention.flatten(2))
