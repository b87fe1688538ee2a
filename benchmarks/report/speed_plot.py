"""How much faster several GPUs are, as a bar chart in SVG."""

from __future__ import annotations

from collections.abc import Sequence

from report.speeds import Speed

ROW = 26
TOP = 40
LABELS = 210  # width in pixels, as all of these
BARS = 420  # of the longest bar
MEASURED = 90
_OURS, _THEIRS, _TEXT = "#2b6cb0", "#a0aec0", "#4a5568"


def draw_speed_plot(speeds: Sequence[Speed]) -> str:
    """One bar for each size and number of GPUs, and xDiT's published ones below."""
    rows = [(f"{each.gpus} GPU(s) at {each.side}²", each.speed_up, _OURS) for each in speeds]
    published = {each.gpus: each.published for each in speeds if each.published}
    one = published.get(1)
    rows += [
        (f"xDiT, {gpus} H100 at 1024², published", one / seconds, _THEIRS)
        for gpus, seconds in published.items()
        if one
    ]
    longest = max((factor for _, factor, _ in rows), default=1.0)
    width, height = LABELS + BARS + MEASURED, TOP + ROW * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="20" font-size="15">A step against one GPU (longer is better)</text>',
    ]
    for number, (label, factor, colour) in enumerate(rows):
        top, length = TOP + ROW * number, factor / longest * BARS
        parts += [
            f'<text x="{LABELS - 10}" y="{top + 17}" text-anchor="end">{label}</text>',
            f'<rect x="{LABELS}" y="{top + 4}" width="{length:.1f}" height="{ROW - 8}" '
            f'fill="{colour}"/>',
            f'<text x="{LABELS + length + 8:.1f}" y="{top + 17}" fill="{_TEXT}">{factor:.2f} ×'
            "</text>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
