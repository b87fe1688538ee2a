"""This project as a custom node pack, in the ways that users get it.

For `ComfyServer(packs={"xdit_sidecar": …})`. The checkout is also installed in the environment of
the tests: a pack that imported itself as `xdit_sidecar` would work here and fail for users.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import project


def clone() -> Path:
    """The repository's root, as `git clone` puts it into custom_nodes/."""
    return project.ROOT


def installed(directory: Path) -> Path:
    """The package's folder from a wheel that is built here: what pip gives, linked by the user."""
    source = project.copy_to(directory / "source")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check"),
            *("-w", str(directory), str(source)),
        ],
        check=True,
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site-packages")
    return directory / "site-packages" / project.PACKAGE
