"""Runs ComfyUI's main.py as ``python main.py …`` would, as a child of a test.

``python launch.py COMFYUI ARGUMENT…``. Ends with its parent, is interrupted by SIGINT even where
the test run is a background job, and finds stand-ins for torchvision, torchaudio and av where they
are not installed. They are not in PYTHONPATH, so that processes which ComfyUI starts do not find
them.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_STUBS = Path(__file__).with_name("stubs")


def main(comfyui: str, *arguments: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _hide_stubs_from_transformers()
    program = os.path.join(comfyui, "main.py")
    sys.path[0] = comfyui
    sys.path.append(str(_STUBS))
    sys.argv[:] = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def _hide_stubs_from_transformers() -> None:
    # It looks once, and would use what it believes to be torchvision.
    from transformers.utils.import_utils import is_torchaudio_available, is_torchvision_available

    is_torchvision_available()
    is_torchaudio_available()


if __name__ == "__main__":
    main(*sys.argv[1:])
