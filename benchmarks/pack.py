"""What the node pack adds to the start of a ComfyUI."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from comfyui import launch
from comfyui_checkout import comfyui
from figures import Figure, percentile

ROUNDS = 5
ROOT = Path(__file__).resolve().parent.parent

# ComfyUI's own function, after what its main.py imports before it.
_PROGRAM = """
import asyncio, os, sys, time
sys.path.insert(0, sys.argv[1])
import launch
launch._hide_stubs_from_transformers()
comfyui, pack, base = sys.argv[2:]
sys.path[:1] = [comfyui, str(launch._STUBS)]
os.chdir(comfyui)
sys.argv[:] = ["main.py", "--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config, nodes, server
async def measure():
    server.PromptServer(asyncio.get_running_loop())
    begin = time.perf_counter()
    assert await nodes.load_custom_node(pack)
    return time.perf_counter() - begin
print("seconds:", asyncio.run(measure()))
"""


def measure() -> list[Figure]:
    """ComfyUI's import of the pack in a fresh process, its files in the page cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        pack = Path(directory) / "base" / "custom_nodes" / "xdit_sidecar"
        pack.parent.mkdir(parents=True)
        pack.symlink_to(ROOT)
        arguments = (Path(launch.__file__).parent, comfyui(), pack, Path(directory) / "base")
        for _ in range(ROUNDS):
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds.append(float(done.stdout.rpartition("seconds:")[2]))
    return [Figure("node pack's import in ComfyUI p50", percentile(seconds, 50), "s", 0.3)]
