"""``make bench``: every figure that the project promises for the CPU, against its threshold.

Prints a table, writes ``benchmarks/results/bench-cpu.json``, and fails when a threshold is missed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import attach  # noqa: E402
import comfyui_restart  # noqa: E402
import control  # noqa: E402
import forward  # noqa: E402
import interrupt  # noqa: E402
import pack  # noqa: E402
import rank_restart  # noqa: E402
import start  # noqa: E402
from figures import Figure  # noqa: E402
from machine import describe_run  # noqa: E402

RESULT = HERE / "results" / "bench-cpu.json"


def main() -> int:
    """Measure everything; 0 when every threshold is met."""
    figures: list[Figure] = []
    for part in (control, attach, forward, start, rank_restart, pack, interrupt, comfyui_restart):
        print(f"{part.__name__} …", flush=True)
        for figure in part.measure():
            print(f"  {figure}", flush=True)
            figures.append(figure)
    RESULT.write_text(
        json.dumps({**describe_run(), "figures": [f.as_dict() for f in figures]}, indent=2) + "\n"
    )
    missed = [figure for figure in figures if not figure.met]
    for figure in missed:
        print(f"MISSED: {figure}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
