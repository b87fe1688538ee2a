"""Fetch the packages that a bare, offline GPU machine may lack, as wheels for its Python.

Usage: ``python benchmarks/gpu/collect_wheels.py DIRECTORY [PYTHON_VERSION]``. Carry the directory
to the machine and name it in ``XDIT_WHEELS`` for ``run.py``. What the stage ``comfyui`` needs
besides is packed into the same directory by ``pack_comfyui.py``.
"""

from __future__ import annotations

import subprocess
import sys

PACKAGES = [
    *("pyzmq", "msgspec", "pytest-randomly"),
    *("diffusers==0.42.1", "xfuser==0.7.0", "yunchang", "distvae"),
    *("importlib-metadata", "lazy-importer", "beautifulsoup4", "soupsieve"),
]
# What ComfyUI needs to start.
COMFYUI = [
    *("torchsde", "trampoline", "simpleeval", "blake3", "comfy-aimdo==0.4.13"),
    *("sqlalchemy", "alembic", "mako", "greenlet"),
    *("pydantic==2.14.3", "pydantic-core==2.50.4", "pydantic-settings==2.16.3"),
    *("annotated-types", "typing-inspection", "python-dotenv"),
]
# Its kernels are larger than all the rest; the wheel without any computes in plain torch.
WITHOUT_KERNELS = ["comfy-kitchen==0.2.31"]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)]


def main() -> int:
    """0 when every wheel was found."""
    directory, version = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "3.12"
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    download = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary=:all:", "--python-version", version, "-d", directory),
    ]
    compiled = ["--implementation", "cp", *platforms, "--platform", "manylinux2014_x86_64"]
    plain = ["--implementation", "py", "--platform", "any"]
    answers = [
        subprocess.run([*download, *compiled, *PACKAGES, *COMFYUI], check=False),
        subprocess.run([*download, *plain, *WITHOUT_KERNELS], check=False),
    ]
    return max(answer.returncode for answer in answers)


if __name__ == "__main__":
    sys.exit(main())
