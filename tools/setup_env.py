"""Creates or updates .venv for development: `make setup`. Needs only the standard library.

Which torch it takes:

1. XDIT_TORCH_SPEC, a pip requirement such as `torch==2.11.0`, where it is set;
2. where no NVIDIA driver answers: the CPU build of the tested version;
3. where one does: the newest CUDA build of the tested version that the driver can run.

Builds for one particular CUDA version, and for none, are at PyTorch's own index. Where that cannot
be reached, the tested version comes from pip's configured index, and a warning says so if that
turns out to be the wrong build. Nothing is done when .venv is already what it should be.

The tests of the status panel need Chromium. As root on Debian it is installed where it is missing,
with CI=true also systemd and a C++ compiler; elsewhere those tests are skipped and say what to
install.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "set-up-for"
OLDEST_PYTHON = (3, 11)
TORCH_INDEX = "https://download.pytorch.org/whl"
CUDA_BUILDS = ("13.2", "13.0", "12.9", "12.8", "12.6", "12.4")  # newest first
EXTRAS = ("daemon", "test", "comfyui", "dev")  # of pyproject.toml; all of them


class Tool(NamedTuple):
    """What some tests need: its programs, Debian's packages of them, and which tests."""

    name: str
    programs: tuple[str, ...]
    packages: tuple[str, ...]
    tests: str


TOOLS = (
    Tool(
        "Chromium",
        ("chromium", "chromedriver"),
        ("chromium", "chromium-driver"),
        "the tests of the status panel",
    ),
)
# Only with CI=true: nobody expects a second init system or a compiler from `make test`.
CI_TOOLS = (
    Tool("systemd", ("systemd-analyze", "systemctl"), ("systemd",), "the tests of the units"),
    Tool("a C++ compiler", ("g++",), ("g++",), "the tests of ranks that compile"),
)
PROBE_TIMEOUT = 3.0  # seconds; an unreachable index must not hold up an offline machine


def driver_version() -> tuple[int, int] | None:
    """The highest CUDA version that this machine's driver runs, or None without a usable GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if cuda.cuInit(0) != 0:
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(number)) != 0 or number.value < 1:
        return None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def wanted_builds(driver: tuple[int, int] | None) -> list[str]:
    """PyTorch's names of the builds that run here, best first: ["cpu"] or ["cu128", "cu126", …]."""
    if driver is None:
        return ["cpu"]
    versions = [tuple(map(int, build.split("."))) for build in CUDA_BUILDS]
    return [f"cu{major}{minor}" for major, minor in versions if (major, minor) <= driver]


def tested_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")


def index_has(build: str, version: str) -> bool | None:
    """Whether PyTorch's index offers that build for this Python; None if it does not answer."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheel = re.compile(
        rf"torch-{re.escape(version)}(\+|%2B){build}-{tag}-{tag}-[\w.]*{platform.machine()}"
    )
    url = f"{TORCH_INDEX}/{build}/torch/"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT) as answer:
            return bool(wheel.search(answer.read().decode("utf-8", "replace")))
    except urllib.error.HTTPError:
        return False
    except OSError:
        return None


def torch_arguments(driver: tuple[int, int] | None, version: str) -> list[str]:
    """pip's arguments for the torch that fits this machine."""
    if spec := os.environ.get("XDIT_TORCH_SPEC"):
        return spec.split()
    for build in wanted_builds(driver):
        found = index_has(build, version)
        if found is None:
            say(f"PyTorch's index does not answer: taking torch {version} from pip's own index")
            break
        if found:
            return [f"torch=={version}+{build}", "--index-url", f"{TORCH_INDEX}/{build}"]
    return [f"torch=={version}"]


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def fingerprint() -> str:
    """Changes with whatever decides what belongs into .venv."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    driver = Path("/proc/driver/nvidia/version")
    digest.update(driver.read_bytes() if driver.exists() else b"no driver")
    spec = os.environ.get("XDIT_TORCH_SPEC", "")
    # An editable install points at this folder, so a moved folder is a new one.
    digest.update(f"{ROOT}|{sys.version}|{spec}|{has_compiler()}".encode())
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def python(*arguments: str) -> None:
    subprocess.run([str(VENV / "bin/python"), *arguments], cwd=ROOT, check=True)


def pip_install(*arguments: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    python("-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments)


def make_venv() -> None:
    """A new .venv, or the one there if it is of this interpreter and still runs."""
    interpreter = VENV / "bin/python"
    if interpreter.exists():
        probe = [str(interpreter), "-c", "import pip, sys; print(sys.version)"]
        answer = subprocess.run(probe, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == sys.version:
            return
        shutil.rmtree(VENV)
    say(f"creating .venv with Python {platform.python_version()}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit(
            f"set-up: {sys.executable} cannot create a virtual environment: its venv module is "
            "missing or incomplete. Install it (Debian: apt install python3-venv) and try again.\n"
            f"{made.stdout}{made.stderr}"
        )


def write_constraints() -> Path:
    """The tested versions as pip's constraints; XDIT_TORCH_SPEC overrules the one of torch."""
    versions = tested_versions()
    if os.environ.get("XDIT_TORCH_SPEC"):
        del versions["torch"]
    path = VENV / "constraints.txt"
    path.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    return path


def check_torch(driver: tuple[int, int] | None) -> None:
    """Says which torch there is, and warns where it does not fit the machine."""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    answer = subprocess.run(
        [str(VENV / "bin/python"), "-c", code], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise SystemExit(f"set-up: torch was installed but does not import:\n{answer.stderr}")
    version, _, cuda = answer.stdout.strip().partition(" ")
    say(f"torch {version}, " + (f"built for CUDA {cuda}" if cuda else "CPU build"))
    if driver is None and cuda:
        say("warning: no NVIDIA driver answers here, so a CPU build would do and be much smaller")
    elif driver is not None and not cuda:
        say("warning: there is a GPU, but this torch cannot use it; XDIT_TORCH_SPEC picks another")
    elif driver is not None and tuple(map(int, cuda.split("."))) > driver:
        say(
            f"warning: the driver runs CUDA up to {driver[0]}.{driver[1]}: "
            "update it, or pick another torch with XDIT_TORCH_SPEC"
        )


def provide_tools() -> None:
    """The programs that some tests need, where this may install them."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    missing = [
        tool
        for tool in (*TOOLS, *(CI_TOOLS if os.environ.get("CI") == "true" else ()))
        if not all(map(shutil.which, tool.programs))
    ]
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for number, tool in enumerate(missing):
        say(f"installing {tool.name}, for {tool.tests}")
        install = ["install", "-y", "--no-install-recommends", *tool.packages]
        for command in ([["update"]] if number == 0 else []) + [install]:
            answer = subprocess.run(
                [*apt, *command], capture_output=True, text=True, check=False, env=environment
            )
            if answer.returncode != 0:
                problem = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
                say(f"WARNING: no {tool.name}, so {tool.tests} will be skipped: {problem[-1:]}")
                break


def set_up() -> None:
    wanted = fingerprint()
    make_venv()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    STAMP.unlink(missing_ok=True)
    driver = driver_version()
    versions = tested_versions()
    constraints = str(write_constraints())
    say(
        "no NVIDIA driver answers: the default is the CPU"
        if driver is None
        else f"NVIDIA driver found, up to CUDA {driver[0]}.{driver[1]}"
    )
    say("installing torch (the largest part)")
    pip_install(f"setuptools=={versions['setuptools']}")
    pip_install(*torch_arguments(driver, versions["torch"]))
    say("installing xdit-sidecar and what its tests need")
    extra = [] if has_compiler() else ["ziglang"]
    package = f".[{','.join(EXTRAS)}]"
    pip_install("--no-build-isolation", "-c", constraints, *extra, "-e", package)
    check_torch(driver)
    STAMP.write_text(wanted)
    say("done")


def main() -> int:
    parser = argparse.ArgumentParser(description="Create or update .venv.")
    parser.add_argument(
        "--driver", action="store_true", help="only print the CUDA version that the driver runs"
    )
    parser.add_argument(
        "--tools", action="store_true", help="also what tests need, where apt-get may install it"
    )
    options = parser.parse_args()
    if options.driver:
        driver = driver_version()
        print("none" if driver is None else f"{driver[0]}.{driver[1]}")
        return 0
    if sys.version_info < OLDEST_PYTHON:
        raise SystemExit(f"set-up: needs Python 3.11 or newer, this is {platform.python_version()}")
    (ROOT / ".cache").mkdir(exist_ok=True)
    with (ROOT / ".cache/set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            set_up()
            if options.tools:
                provide_tools()
        except subprocess.CalledProcessError as error:
            say(f"failed: {' '.join(map(str, error.cmd))}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
