"""`make demo` on the CPU; a stage of the soak runs it on the fake CUDA driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import project
import pytest
import torch
from demo_files import ensure_files
from digits_scene import reader
from PIL import Image
from platforms import Platform, make_platform

pytestmark = pytest.mark.timeout(600)


def run_demo(cache: Path, platform: Platform, **environment: str) -> tuple[int, str]:
    """The demo's exit status and what it printed."""
    done = subprocess.run(
        [
            *(sys.executable, str(project.ROOT / "examples/demo.py")),
            *("--device", platform.option, "--cache-dir", str(cache)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout


def read_sheet(path: Path) -> list[int]:
    """The digits on the demo's sheet: two rows of five, 128 pixels each and 8 between them."""
    with Image.open(path) as image:
        size, data = image.size, image.convert("RGB").tobytes()
    sheet = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(size[1], size[0], 3) / 255
    corners = [(row, column) for row in (8, 144) for column in range(8, 688, 136)]
    return reader().read(torch.stack([sheet[y : y + 128, x : x + 128] for y, x in corners]))


def check_demo(platform: Platform, cache: Path, times: int = 1) -> None:
    """So many runs, of which the first writes its files to ``cache``."""
    temporary = tempfile.mkdtemp(prefix="xd-", dir="/tmp")
    try:
        for _ in range(times):
            more = {**platform.environment, "TMPDIR": temporary}
            status, text = run_demo(cache, platform, **more)
            assert status == 0, text
            copies = [float(c) for c in re.findall(r"physical copies, .*?: (\d+\.\d+) \(", text)]
            assert len(copies) == (6 if platform.option == "cpu" else 2), text
            with_ranks = re.findall(r"physical copies with 2 ranks .*: (\d+\.\d+)", text)
            assert [round(float(c)) for c in with_ranks] == (
                [1] if platform.option == "cpu" else []
            )
            assert all(round(count) == 1 for count in copies), text
            assert "\x1b" not in text  # plain where it is no terminal
            assert "WRONG" not in text
            assert not os.listdir(temporary)
            read = read_sheet(cache / "picture.png")
            assert sum(a == b for a, b in enumerate(read)) >= 9, read
        assert sorted(path.name for path in cache.iterdir()) == [
            "ae.safetensors",
            "clip_l.safetensors",
            "flux1.safetensors",
            "picture.png",
            "t5xxl.safetensors",
        ]
    finally:
        os.rmdir(temporary)


def test_the_demo_measures_one_copy(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    check_demo(make_platform("cpu", tmp_path), cache)
    # What the next demo begins with: only what is not whole is written again.
    written = {file.path: file.path.stat() for file in ensure_files(cache)}
    cut = cache / "ae.safetensors"
    os.truncate(cut, written[cut].st_size - 1)
    for file in ensure_files(cache):
        found = file.path.stat()
        assert found.st_size == written[file.path].st_size
        assert (found.st_ino == written[file.path].st_ino) == (file.path != cut)


def test_the_picture_of_the_readme_shows_the_digits() -> None:
    assert read_sheet(project.ROOT / "docs/pictures/digits.png") == list(range(10))


def test_the_demo_fails_in_words(tmp_path: Path) -> None:
    # A daemon that cannot start, for want of a device.
    cache = tmp_path / "cache"
    none = Platform("none", "cuda")
    status, text = run_demo(cache, none, XDIT_SIDECAR_LIBCUDA=str(tmp_path / "missing.so"))
    assert status == 1
    assert "the daemon did not start" in text
    assert "no CUDA device" in text
    assert "Traceback" not in text
