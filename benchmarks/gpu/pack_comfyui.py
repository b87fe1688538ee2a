"""Pack checkouts of ComfyUI for a bare, offline GPU machine: their code, not their pictures.

Usage: ``python benchmarks/gpu/pack_comfyui.py DIRECTORY CHECKOUT…``. Carry the directory to the
machine and name it in ``XDIT_WHEELS`` for ``run.py``. Without a checkout, the one of the tests.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREFIX = "comfyui-"
SUFFIX = ".tar.xz"
LEFT_OUT = {".git", ".github", "__pycache__", "tests", "tests-unit", "blueprints", "web"}
SUFFIXES_LEFT_OUT = {".pyc", ".png", ".jpg", ".mp4", ".webp", ".svg"}


def main() -> int:
    """Write ``comfyui-VERSION.tar.xz`` of each."""
    directory, *checkouts = sys.argv[1:]
    for checkout in map(Path, checkouts or [_of_the_tests()]):
        path = Path(directory) / f"{PREFIX}{read_version(checkout)}{SUFFIX}"
        with tarfile.open(path, "w:xz") as archive:
            archive.add(checkout, arcname=".", filter=_choose)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def read_version(checkout: Path) -> str:
    """Which ComfyUI it is."""
    found = re.search(r'__version__ = "(.+)"', (checkout / "comfyui_version.py").read_text())
    assert found, f"{checkout} is no checkout of ComfyUI"
    return found[1]


def unpack(archive: Path, directory: Path) -> Path:
    """The checkout's folder in ``directory``."""
    target = directory / archive.name.removesuffix(SUFFIX)
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    return target


def find_checkouts(directory: Path) -> list[Path]:
    """What was packed, unpacked in ``directory``, newest first; or else the one of the tests."""
    if not (packed := os.environ.get("XDIT_WHEELS")):
        return [_of_the_tests()]
    archives = Path(packed).glob(f"{PREFIX}*{SUFFIX}")
    found = [unpack(archive, directory) for archive in archives]
    return sorted(
        found, key=lambda each: [int(n) for n in read_version(each).split(".")], reverse=True
    )


def _choose(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    path = Path(member.name)
    if LEFT_OUT & set(path.parts) or path.suffix in SUFFIXES_LEFT_OUT:
        return None
    return member


def _of_the_tests() -> Path:
    sys.path.insert(0, str(HERE.parent.parent / "tests"))
    from comfyui_checkout import comfyui

    return comfyui()


if __name__ == "__main__":
    sys.exit(main())
