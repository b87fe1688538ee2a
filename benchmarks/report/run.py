"""Write ``gpu.md`` and its plots from the results that there are.

Usage: ``python benchmarks/report/run.py [DIRECTORY]``; by default benchmarks/results. Needs nothing
but Python. Exit status 0 also where targets were missed: the stages themselves tell.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from report.plot import draw_plot  # noqa: E402
from report.results import judge, read_results  # noqa: E402
from report.speed_plot import draw_speed_plot  # noqa: E402
from report.speeds import read_speeds  # noqa: E402
from report.table import PLOT, SPEED_PLOT, write_table  # noqa: E402
from targets import TARGETS  # noqa: E402


def main() -> int:
    """All of them, beside the results."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results"
    results = read_results(directory)
    outcomes = judge(TARGETS, results)
    (directory / "gpu.md").write_text(write_table(outcomes, results))
    (directory / PLOT).write_text(draw_plot(outcomes))
    if (several := results.get("gpu-several")) is not None:
        (directory / SPEED_PLOT).write_text(draw_speed_plot(read_speeds(several)))
    print(f"{directory / 'gpu.md'}: {sum(each.figure is not None for each in outcomes)} measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
