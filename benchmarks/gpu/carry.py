"""Assemble all that a bare, offline GPU machine needs beside this checkout.

Usage: ``python benchmarks/gpu/carry.py DIRECTORY [PYTHON_VERSION]``. Takes wheels for that Python
from the package index and packs the tests' ComfyUI, or the one that ``$XDIT_COMFYUI_DIR`` names.
Carry the checkout and the directory, and run there ``XDIT_WHEELS=DIRECTORY make bench-gpu``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """0 when everything was found."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    directory, *version = sys.argv[1:]
    Path(directory).mkdir(parents=True, exist_ok=True)
    parts = [["collect_wheels.py", directory, *version], ["pack_comfyui.py", directory]]
    answers = [
        subprocess.run([sys.executable, str(HERE / name), *arguments], check=False)
        for name, *arguments in parts
    ]
    return max(answer.returncode for answer in answers)


if __name__ == "__main__":
    sys.exit(main())
