"""How much of each limit is used, as a bar chart in SVG, written by hand: no plotting library."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.sax.saxutils import escape

from report.results import Outcome
from report.table import format_value

ROW = 34
TOP = 46
LABELS = 440  # width in pixels, as all of these
BARS = 320  # of a bar of LONGEST
MEASURED = 200
LONGEST = 2.0  # times the limit; what is beyond is cut off
_MET, _MISSED, _NONE = "#2f855a", "#c53030", "#718096"


def draw_plot(outcomes: Sequence[Outcome]) -> str:
    """One row for each target that has been measured."""
    rows = [each for each in outcomes if each.figure is not None]
    height = TOP + ROW * len(rows) + 12
    width = LABELS + BARS + MEASURED
    limit = LABELS + BARS / LONGEST
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="20" font-size="15">Used of what each target allows (shorter is better)'
        "</text>",
        f'<text x="{limit}" y="{TOP - 8}" text-anchor="middle" fill="{_NONE}">limit</text>',
    ]
    for number, outcome in enumerate(rows):
        parts += _row(outcome, TOP + ROW * number)
    bottom = height - 8
    parts.append(
        f'<path d="M{limit} {TOP - 4}V{bottom}" stroke="{_NONE}" stroke-dasharray="4 3"/></svg>'
    )
    return "\n".join(parts) + "\n"


def _row(outcome: Outcome, top: int) -> list[str]:
    figure, share = outcome.figure, outcome.share
    assert figure is not None
    assert share is not None
    length = max(2.0, min(share, LONGEST) / LONGEST * BARS)
    lines = textwrap.wrap(outcome.target.what, 66)[:2]
    first = top + ROW / 2 + 4 - 7 * (len(lines) - 1)
    measured = f"{format_value(figure.value, figure.unit)} ({outcome.target.bound})"
    return [
        *(
            f'<text x="{LABELS - 10}" y="{first + 14 * at:g}" text-anchor="end">'
            f"{escape(line)}</text>"
            for at, line in enumerate(lines)
        ),
        f'<rect x="{LABELS}" y="{top + 7}" width="{length:.1f}" height="{ROW - 14}" '
        f'fill="{_MET if figure.met else _MISSED}"/>',
        f'<text x="{LABELS + BARS + 10}" y="{top + ROW / 2 + 4:g}">{escape(measured)}</text>',
    ]
