"""The readme's figures are those of the files that it names, rounded as it rounds them."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import documents
import pytest
from project import ROOT

RESULTS = ROOT / "benchmarks/results"


@cache
def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def figure(name: str, what: str, scale: float = 1.0) -> float:
    """The value of one line of a result."""
    values = {line["name"]: line["value"] for line in result(name)["figures"]}
    assert what in values, f"{name}.json has no {what!r} any more: which line has it now?"
    return float(values[what]) * scale


def soak(key: str) -> int:
    """A count over all attacks."""
    return sum(stage.get(key, 0) for stage in result("soak")["stages"].values())


def ones(*values: float, unit: str, digits: int = 0) -> str:
    """Values as a cell has them: "178.9 / 177.9 ms"."""
    return " / ".join(f"{value:,.{digits}f}" for value in values) + f" {unit}"


def span(*values: float, digits: int) -> str:
    """The least and the largest."""
    return f"{min(values):,.{digits}f}-{max(values):,.{digits}f}"


# Beginning of a row → what is in it.
def expected() -> dict[str, str]:
    sharing, serving, load, bench = "gpu-sharing", "gpu-serving", "gpu-load-file", "bench-cpu"
    several = "gpu-several"
    shared = [
        line["value"]
        for line in result(several)["figures"]
        if line["name"].startswith(("against one GPU: ulysses", "against one GPU: ring"))
    ]
    two = [
        figure(serving, f"2 ranks on one GPU, {which} picture: a step")
        for which in ("first", "second")
    ]
    apart = [
        figure(serving, f"two ranks against one, {size}")
        for size in ("(128, 128, 512)", "(125, 121, 509)")
    ]
    context = result("gpu-health")["report"]["checks"]
    (cost,) = {
        found[1]
        for check in context
        if (found := re.search(r"context of one process costs (\d+ MiB)", check["detail"]))
    }
    assert not soak("pings_failed")
    modes = ("off", "auto")
    slow = max(stage.get("ping_max", 0) for stage in result("soak")["stages"].values())
    return {
        "hand-over of weights that are on the GPU": ones(
            figure(sharing, "hand-over from the GPU"), unit="ms"
        ),
        "hand-over from ordinary host memory": ones(
            figure(sharing, "hand-over from pageable host memory"), unit="s", digits=1
        ),
        "attach in another process, until": ones(
            figure(sharing, "attach in another process"), unit="ms"
        ),
        "attach after the process": ones(
            figure(sharing, "attach after that process was killed"), unit="ms"
        ),
        "device memory over all processes": ones(
            figure(sharing, "device memory / bytes"), unit="× the weights' bytes", digits=2
        ),
        "the daemon's own share": cost,
        "daemon's memory owner killed": ones(
            figure(sharing, "keeper killed: until one copy again"), unit="s", digits=1
        ),
        "attach a resident component of 1,000": ones(
            figure(bench, "attach 1,000 tensors / 2 GB p50"), unit="ms"
        ),
        "one question to the daemon": ones(
            figure(bench, "control round trip p50", 1e-3), unit="ms", digits=1
        )
        + ones(figure(bench, "control round trip p50 / bare echo p50"), unit="×", digits=1).join(
            (", ", " a bare ZeroMQ echo")
        ),
        "daemon start until it serves": ones(
            figure(bench, "daemon start to ready p50"), unit="s", digits=1
        ),
        "10,000 hand-overs and attaches": "nothing left behind",
        f"{result('soak')['hostile_inputs']:,} hostile messages": (
            f"no crash; all {soak('pings') - soak('pings_failed'):,} questions of an honest client "
            f"meanwhile were answered, the slowest after {slow:.1f} s"
        ),
        "23.8 GB file": ones(figure(load, "warm, 8 readers: seconds"), unit="s", digits=1)
        + f" (pageable staging: {figure(load, 'warm, pageable: seconds'):.1f} s)",
        "attach it in another process": ones(figure(load, "attach in another process"), unit="ms"),
        "forward at 1024² by the rank": ones(
            figure(serving, "forward at 1024², service"),
            figure(serving, "forward at 1024², this process"),
            unit="ms",
            digits=1,
        ),
        "the same forward by the rank, compiled": ones(
            figure(serving, "forward at 1024², service, compiled"), unit="ms", digits=1
        ),
        "a step of ComfyUI 0.3.75 with its own loaders": ones(
            figure("gpu-steps", "stock ComfyUI's step at 1024²"),
            figure("gpu-steps", "the ranks' step at 1024²"),
            figure("gpu-steps", "the ranks' step at 1024², fp8_e4m3fn_fast"),
            unit="ms",
        ),
        "of 100 digits of the demo model": ones(
            figure("gpu-fp8-error", "read rightly of 100, bf16"),
            figure("gpu-fp8-error", "read rightly of 100, fp8"),
            unit="",
        ).strip(),
        "300 prompts of 4 steps": f"{figure('gpu-prompts', 'errors'):.0f} errors, "
        + ones(figure("gpu-prompts", "device memory grown"), unit="MiB more device memory"),
        "picture of 1024², 8 steps": ones(
            figure(serving, "1 rank, second picture: 8 steps in all"), unit="s", digits=1
        ),
        "rank killed until the next forward": ones(
            figure(serving, "rank killed until the next forward"), unit="s", digits=1
        ),
        "forward / decode on a full card": "refused in "
        + ones(
            figure(serving, "Forward on a full card"),
            figure(serving, "Decode on a full card"),
            unit="s",
            digits=2,
        ),
        "two ranks on this one GPU": f"relative difference {span(*apart, digits=3)}",
        **{
            f"a step at {side}², compiled": ones(
                *(figure(several, f"{n} GPU(s), auto, {side}²: a step") for n in (1, 2)), unit="ms"
            )
            for side in (1024, 2048)
        },
        "a step at 2048², eager": ones(
            *(figure(several, f"{n} GPU(s), off, 2048²: a step") for n in (1, 2)), unit="ms"
        ),
        "28 steps at 1024²": ones(
            *(figure(several, f"{n} GPU(s), auto, 1024²: 28 steps with text") for n in (1, 2)),
            unit="s",
            digits=1,
        ),
        **{
            label: ones(
                *(figure("gpu-lora", f"{n} GPU(s), {mode}, LoRA: a forward") for mode in modes),
                unit="ms",
            )
            for n, label in ((1, "a forward at 1024² with a LoRA"), (2, "the same by two"))
        },
        "decode at 4096²": ones(
            *(figure(several, f"{n} GPU(s): decode at 4096²") for n in (1, 2)), unit="s", digits=1
        ),
        "all components, 34 GB": ones(
            figure(several, "GPU 1: all components, from GPU 0"), unit="s", digits=1
        ),
        "ulysses 2 and ring 2": f"relative difference {span(*shared, digits=3)}",
        "one of two ranks killed": ones(
            figure(several, "rank killed amid a picture: until the next step"), unit="s", digits=1
        ),
        "a step of a picture of 1024²": f"{figure(serving, '1 rank, second picture: a step'):.0f}"
        f" / {span(*two, digits=0)} ms",
    }


def figures() -> list[list[str]]:
    """The cells of the tables below the heading Figures."""
    section = documents.read("README.md").partition("\n## Figures\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| (?!---|what )", line)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def differences(rows: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    """Rows of the tables that say something else, or are in one of the two only."""
    found = {}
    for label, written in rows.items():
        keys = [key for key in wanted if label.startswith(key)]
        if not keys or not written.startswith(wanted[keys[0]]):
            found[label] = f"written {written!r}, measured {[wanted[key] for key in keys]}"
    for key in wanted:
        if not any(label.startswith(key) for label in rows):
            found[key] = "no row says it"
    return found


def test_the_tables_say_what_the_results_say() -> None:
    rows = {cells[0]: cells[1] for cells in figures() if len(cells) == 2}
    assert differences(rows, expected()) == {}
    assert all(s["cycles"] >= 10_000 for n, s in result("soak")["stages"].items() if "cycles" in n)


def test_a_figure_that_is_wrong_is_noticed() -> None:
    assert differences({"a b": "30 ms"}, {"a": "30 ms"}) == {}
    assert set(differences({"a": "31 ms", "b": "1 s"}, {"a": "30 ms", "c": "1 s"})) == set("abc")


CASES = ("0.33.0 default", "0.33.0 --disable-dynamic-vram", "0.33.0 --lowvram")
CASES = (*CASES, "0.3.75 default", "0.3.75 --lowvram")


def comfyui_cases() -> dict[str, Any]:
    """By name."""
    cases: dict[str, Any] = result("gpu-comfyui")["cases"]
    return cases


@pytest.mark.parametrize(
    ("label", "path", "form"),
    [
        ("first prompt", ("seconds", "first prompt"), "{:.1f} s"),
        ("second prompt", ("seconds", "second prompt"), "{:.1f} s"),
        ("latent against", ("against the stock loaders", "latent", "relative"), "{:.3f}"),
        ("ComfyUI killed", ("seconds", "loaders after a restart"), "{:.1f} s"),
        ("bytes that it read", ("bytes read after a restart",), "{:.1f} MB"),
        ("daemon killed in a prompt", ("seconds", "from the daemon's death to the error"), ""),
    ],
)
def test_the_table_of_comfyui(label: str, path: tuple[str, ...], form: str) -> None:
    (cells,) = [cells for cells in figures() if len(cells) > 2 and cells[0].startswith(label)]
    for case, written in zip(CASES, cells[1:], strict=True):
        value: Any = comfyui_cases()[case]
        for key in path:
            value = value.get(key) if value else None
        if value is not None and "MB" in form:
            value /= 1e6
        shown = form or ("{:.2f} s" if value is not None and value < 0.1 else "{:.1f} s")
        assert written == ("" if value is None else shown.format(value)), case


def test_what_comfyui_promised_there() -> None:
    cases = comfyui_cases()
    assert set(CASES) == set(cases)
    for case in cases.values():
        assert all(case["checks"].values()), case["case"]
        assert case["checks"]["one copy on the device"]
        assert case["checks"]["probe after /free: parameters lie in regions"]
