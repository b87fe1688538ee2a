"""What came of the targets, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from report.results import Outcome, Result
from report.speeds import read_speeds

PLOT = "gpu.svg"
SPEED_PLOT = "gpu-several.svg"
_HEAD = f"""# Targets on a GPU

Made by `make bench-gpu` from the `gpu-*.json` beside it; not written by hand. FLUX.1-dev's
transformer (11.9 B, bf16), FLUX's VAE, CLIP-L and T5-XXL at full size with random weights.

![how much of each limit is used]({PLOT})
"""


def write_table(outcomes: Sequence[Outcome], results: Mapping[str, Result]) -> str:
    """The page: targets, then where each result comes from."""
    known = [each for each in outcomes if each.figure is not None]
    met = sum(each.figure.met for each in known if each.figure is not None)
    summary = f"{met} of {len(outcomes)} met, {len(known) - met} missed"
    if left := len(outcomes) - len(known):
        summary += f", {left} not measured yet"
    parts = [
        _HEAD,
        f"{summary}.\n",
        _table(("what", "target", "measured", "met", "result"), map(_outcome_row, outcomes)),
        *_step_section(results),
        *_gpus_section(results),
        "## Where the results come from\n",
        _table(
            ("result", "date", "commit", "machine", "versions"),
            (_result_row(name, result) for name, result in results.items()),
        ),
    ]
    return "\n".join(parts)


def format_value(value: float, unit: str) -> str:
    """A count as it is, else as many digits as one wants to read."""
    if not unit:
        return f"{value:g}"
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:#.4g} {unit}"


def _step_section(results: Mapping[str, Result]) -> list[str]:
    """What holds a step back."""
    if (floor := results.get("gpu-floor")) is None:
        return []
    rows = [(each["name"], format_value(each["value"], each["unit"])) for each in floor["figures"]]
    return ["## What a step is made of\n", _table(("what", "measured"), rows)]


def _gpus_section(results: Mapping[str, Result]) -> list[str]:
    """Steps and pictures by one GPU and by several."""
    if (several := results.get("gpu-several")) is None:
        return []
    rows = [
        (
            str(each.gpus),
            f"{each.side}²",
            *(format_value(ms, "ms") if ms else "–" for ms in (each.eager, each.compiled)),
            format_value(each.speed_up, "×"),
            format_value(each.seconds, "s"),
            format_value(each.published, "s") if each.published else "–",
        )
        for each in read_speeds(several)
    ]
    head = ("GPUs", "picture", "eager step", "compiled step", "faster than one", "28 steps")
    return [
        "## Several GPUs\n",
        "28 steps with the text encoders and without decoding, by the faster way. Beside them what "
        "xDiT publishes for 28 compiled steps on H100s, which is not of this run.\n",
        f"![speed by GPUs]({SPEED_PLOT})\n",
        _table((*head, "xDiT, H100"), rows),
    ]


def _outcome_row(outcome: Outcome) -> tuple[str, ...]:
    target, figure = outcome.target, outcome.figure
    if figure is None:
        return target.what, target.bound, "not measured yet", "–", ""
    link = f"[{target.result}]({target.result}.json)"
    measured = format_value(figure.value, figure.unit)
    return target.what, target.bound, measured, "yes" if figure.met else "**no**", link


def _result_row(name: str, result: Result) -> tuple[str, ...]:
    machine = result["machine"]
    versions = dict(result["versions"])
    if "comfyui" in result:
        versions["ComfyUI"] = result["comfyui"]
    return (
        f"[{name}]({name}.json)",
        result["date"],
        result["commit"] or "unknown",
        f"{machine['gpu'] or 'no GPU'}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gib']} GiB; Linux {machine['kernel']}",
        ", ".join(f"{package} {version}" for package, version in versions.items() if version),
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
