"""Building the fake driver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fake_cuda import build


def test_workers_build_the_fake_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_CACHE", tmp_path)
    with ThreadPoolExecutor(4) as threads:
        built = set(threads.map(lambda _: build.fake_libcuda(), range(4)))
    assert built == {str(path) for path in tmp_path.iterdir()}
    assert len(built) == 1
    (tmp_path / Path(built.pop()).name).unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        build.fake_libcuda()
