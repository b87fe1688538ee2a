"""``make bench-gpu``: its report, from recorded results, and that its stages can be started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import flux_files
import project
import pytest

BENCHMARKS = project.ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
SVG = "{http://www.w3.org/2000/svg}"
RECORDED = {
    "date": "2026-11-24",
    "commit": "0123456789ab",
    "machine": {
        "cpu": "a CPU",
        "cores": 4,
        "memory_gib": 16,
        "kernel": "6.1",
        "gpu": "a GPU, 580, 80 GiB",
    },
    "versions": {"python": "3.12.3", "torch": "2.11.0", "msgpack": None},
}
SHARING = {
    **RECORDED,
    # As earlier results have it: "threshold", and not the limit of today.
    "figures": [
        {"name": "hand-over from the GPU", "value": 49.9, "unit": "ms", "threshold": 10.0},
        {"name": "hand-over from pageable host memory", "value": 1.25, "unit": "s"},
        {"name": "of no target", "value": 7.0, "unit": "s"},
    ],
}
STEPS = {
    **RECORDED,
    "comfyui": "0.33.0",
    "figures": [{"name": "stock step / ranks' step", "value": 1.25, "unit": "×"}],
}
LOST = {
    **RECORDED,
    "figures": [{"name": "components read after a restart", "value": 1, "unit": ""}],
}
FLOOR = {
    **RECORDED,
    "figures": [
        {"name": "step / floor", "value": 1.31, "unit": "×"},
        {"name": "of a step: its attention alone", "value": 22.5, "unit": "ms"},
    ],
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the benchmarks can be imported."""
    before = set(sys.modules)
    for folder in ("benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(str(project.ROOT / folder))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def report(directory: Path) -> tuple[list[list[str]], ElementTree.Element]:
    """The rows of all tables, and the plot."""
    program = BENCHMARKS / "report" / "run.py"
    subprocess.run([sys.executable, str(program), str(directory)], check=True, capture_output=True)
    page = (directory / "gpu.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| ")
    ]
    return rows, ElementTree.fromstring((directory / "gpu.svg").read_text())  # noqa: S314  our own


def run_stages(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = BENCHMARKS / "gpu" / "run.py"
    return subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, check=False
    )


def test_report_of_recorded_results(tmp_path: Path) -> None:
    results = {"sharing": SHARING, "steps": STEPS, "comfyui": LOST, "floor": FLOOR}
    for name, result in results.items():
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(result))
    rows, plot = report(tmp_path)

    by_result = {row[4]: row for row in rows if len(row) == 5 and "gpu-sharing" not in row[4]}
    handed_over = [row[1:4] for row in rows if "gpu-sharing" in row[-1]]
    assert handed_over == [["≤ 50 ms", "49.90 ms", "yes"], ["≤ 1 s", "1.250 s", "**no**"]]
    steps = by_result["[gpu-steps](gpu-steps.json)"]
    assert steps[1:4] == ["≥ 1.3 ×", "1.250 ×", "**no**"]
    assert by_result["[gpu-comfyui](gpu-comfyui.json)"][1:4] == ["≤ 0", "1", "**no**"]
    assert by_result["[gpu-floor](gpu-floor.json)"][3] == "yes"
    assert ["of a step: its attention alone", "22.50 ms"] in rows
    unmeasured = [row for row in rows if len(row) == 5 and row[2] == "not measured yet"]
    assert unmeasured
    assert {row[3] for row in unmeasured} == {"–"}
    page = (tmp_path / "gpu.md").read_text()
    assert f"2 of {5 + len(unmeasured)} met, 3 missed, {len(unmeasured)} not measured yet" in page
    assert [
        *("[gpu-steps](gpu-steps.json)", "2026-11-24", "0123456789ab"),
        "a GPU, 580, 80 GiB; 4 cores of a CPU, 16 GiB; Linux 6.1",
        "python 3.12.3, torch 2.11.0, ComfyUI 0.33.0",
    ] in rows

    # One bar for each that was measured, as long as its share of the limit; the longest are cut.
    (background, *bars) = plot.findall(f"{SVG}rect")
    assert len(bars) == 5
    lengths = [float(bar.get("width", 0)) for bar in bars]
    per_limit = lengths[0] / 0.998
    assert lengths[1] == pytest.approx(1.25 * per_limit, rel=0.01)  # from host memory
    assert lengths[2] == pytest.approx(2 * per_limit, rel=0.01)  # read, which nothing may be
    assert lengths[3] == pytest.approx(1.3 / 1.25 * per_limit, rel=0.01)  # too little gained
    assert float(bars[0].get("x", 0)) + max(lengths) < float(background.get("width", 0))
    colours = [bar.get("fill") for bar in bars]
    assert colours[0] == colours[4] != colours[1]
    assert colours[1] == colours[2] == colours[3]


def test_report_of_several_gpus(tmp_path: Path) -> None:
    figures = {
        "1 GPU(s), off, 1024²: a step": 170.0,
        "1 GPU(s), off, 1024²: 28 steps with text": 5.6,
        "2 GPU(s), off, 1024²: a step": 140.0,
        "2 GPU(s), off, 1024²: 28 steps with text": 4.4,
        "2 GPU(s), auto, 1024²: a step": 100.0,
        "2 GPU(s), auto, 1024²: 28 steps with text": 3.3,  # in which it is recorded
        "2 GPU(s), auto, 1024²: 28 steps with text, again": 3.0,
    }
    recorded = [{"name": name, "value": value, "unit": "ms"} for name, value in figures.items()]
    result = {**RECORDED, "published": {"1": 4.3, "2": 2.6}, "figures": recorded}
    (tmp_path / "gpu-several.json").write_text(json.dumps(result))
    rows, _ = report(tmp_path)
    found = [row for row in rows if row[1:2] == ["1024²"]]
    # By the faster way each; what was not measured is no number.
    assert found == [
        ["1", "1024²", "170 ms", "–", "1.000 ×", "5.600 s", "4.300 s"],
        ["2", "1024²", "140 ms", "100 ms", "1.700 ×", "3.000 s", "2.600 s"],
    ]
    plot = ElementTree.fromstring((tmp_path / "gpu-several.svg").read_text())  # noqa: S314
    (_, one, two, theirs, theirs_two) = plot.findall(f"{SVG}rect")
    lengths = [float(bar.get("width", 0)) for bar in (one, two, theirs, theirs_two)]
    assert lengths[1] / lengths[0] == pytest.approx(1.7, rel=0.01)
    assert lengths[3] / lengths[2] == pytest.approx(4.3 / 2.6, rel=0.01)
    assert lengths[0] == lengths[2]


def test_committed_report_is_of_the_committed_results(tmp_path: Path) -> None:
    for path in RESULTS.glob("gpu-*.json"):
        shutil.copy(path, tmp_path)
    report(tmp_path)
    for name in ("gpu.md", "gpu.svg", "gpu-several.svg"):
        made = (tmp_path / name).read_text()
        assert made == (RESULTS / name).read_text(), "run python benchmarks/report/run.py"


@pytest.mark.usefixtures("bench")
def test_recorded_results_have_the_figures_of_their_targets() -> None:
    """Every result that is there shows something, so no name was changed on one side alone."""
    from report.results import judge, read_results
    from targets import TARGETS

    results = read_results(RESULTS)
    measured = {each.target.result for each in judge(TARGETS, results) if each.figure is not None}
    assert measured == {target.result for target in TARGETS} & set(results)


@pytest.mark.usefixtures("bench")
def test_figures_of_a_real_comfyui() -> None:
    from comfyui_figures import figures_of

    def case(seconds: dict[str, float], said: list[str], outside: int) -> dict[str, object]:
        used = [{"processes": {"keeper": 500}}]
        used.append({"processes": {"keeper": 1500}, "components": {"vae": 400, "t5": 600}})
        return {
            "seconds": seconds,
            "said after a restart": said,
            "memory": dict(zip(("ready, nothing loaded", "after two prompts"), used, strict=True)),
            "probe": {"probe": {"clip": {"outside": [1, outside]}, "vae": {"outside": [0, 0]}}},
        }

    fine = case({"loaders after a restart": 0.7}, ["xDiT: vae a on cuda:0, was resident"], 10)
    poor = case({"loaders after a restart": 1.75}, ["xDiT: vae a on cuda:0, read 400 bytes"], 0)
    figures = {figure.name: figure for figure in figures_of([fine, poor])}
    assert figures["loaders after a restart"].value == 1.75
    assert figures["components read after a restart"].value == 1
    assert figures["device memory / bytes"].value == pytest.approx(1.01)
    assert not any(figure.met for figure in figures.values())
    failed = {"seconds": {}, "memory": {"before": {}}, "probe": {}}
    assert figures_of([failed]) == []


@pytest.mark.usefixtures("bench")
def test_arithmetic_of_a_step() -> None:
    """Against the weights themselves: each is multiplied with every token that passes it."""
    import flux_work

    model = flux_files.DEV
    image, text = 4096, 512
    flop = sum(each.flop for each in flux_work.list_multiplications(model, image, text))
    expected = 0.0
    for name, shape in flux_files.shapes_of(model).items():
        if len(shape) == 2 and "_blocks." in name and "mod" not in name and "norm" not in name:
            tokens = {"img": image, "txt": text}.get(name.split(".")[2][:3], image + text)
            expected += 2.0 * tokens * shape[0] * shape[1]
    assert flop == expected
    assert flop + flux_work.attention_flop(model, image + text) == pytest.approx(74.4e12, rel=1e-3)


@pytest.mark.usefixtures("bench")
def test_limits_work_both_ways() -> None:
    from figures import Figure

    assert [Figure("", 2.0, "", limit).met for limit in (None, 2.0, 1.9)] == [True, True, False]
    assert [Figure("", 2.0, "", limit, True).met for limit in (2.0, 2.1)] == [True, False]
    written = {"name": "a", "value": 2.0, "unit": "s", "limit": 3.0, "met": True}
    assert Figure("a", 2.0, "s", 3.0).as_dict() == written


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    stages = run_stages("--list").stdout.split()
    assert {"sharing", "serving", "steps", "prompts"} <= set(stages)
    wrong = run_stages(str(tmp_path / "out"), "no-such-stage")
    assert (wrong.returncode, "no-such-stage" in wrong.stdout) == (2, True)
    assert not (tmp_path / "out").exists()


def test_programs_of_stages_can_be_imported() -> None:
    """Where there is no GPU that is all that can be seen of them."""
    folder = BENCHMARKS / "gpu"
    programs = sorted(
        path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()
    )
    assert {"floor", "load_file", "prompts", "real_comfyui", "sizes", "steps"} <= set(programs)
    code = f"import {', '.join(programs)}"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
