"""Fetch the packages that a bare, offline GPU machine may lack, as wheels for its Python.

Usage: ``python benchmarks/gpu/collect_wheels.py DIRECTORY [PYTHON_VERSION]``. Carry the directory
to the machine and name it in ``XDIT_WHEELS`` for ``run.py``.
"""

from __future__ import annotations

import subprocess
import sys

PACKAGES = [
    *("pyzmq", "msgspec", "pytest-randomly"),
    *("diffusers==0.42.1", "xfuser==0.7.0", "yunchang", "distvae", "importlib-metadata"),
    *("beautifulsoup4", "soupsieve"),
]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)]


def main() -> int:
    """0 when every wheel was found."""
    directory, version = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "3.12"
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", version),
            *platforms,
            *("--platform", "manylinux2014_x86_64", "-d", directory, *PACKAGES),
        ],
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
