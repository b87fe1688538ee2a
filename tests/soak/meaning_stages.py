"""The model that draws digits, with the full counts: how many pictures are read rightly, where."""

from __future__ import annotations

import tempfile
from pathlib import Path

from comfyui import test_meaning as in_comfyui
from digits_scene import BROKEN, RIGHT, DigitsFiles, Request
from meaning import test_faults as faults
from meaning import test_pipeline as ways
from picture_scene import drawing
from ranks_scene import running_ranks

Figures = dict[str, object]

_BATCH = 20  # pictures at once


def by_the_pipeline(pictures: int = 100) -> Figures:
    """By the pipeline service, on two ranks."""
    batches = [min(_BATCH, pictures - done) for done in range(0, pictures, _BATCH)]
    with (
        tempfile.TemporaryDirectory() as directory,
        running_ranks(Path(directory, "ranks"), 2, "--deadline", "60") as scene,
        scene.daemon.client("drawer") as client,
        drawing(client, DigitsFiles()) as drawer,
    ):
        right = sum(
            Request(count, seed=seed).count_right(drawer) for seed, count in enumerate(batches)
        )
    assert right >= RIGHT * pictures, f"{right} of {pictures}"
    return {"pictures": pictures, "right": right}


def inside_comfyui(batch: int = 10) -> Figures:
    """By the stock sampler with our forwards, by our own nodes, and without the daemon."""
    right, pictures = {}, {"forwards": 10 * batch, "all": 2 * batch, "stock": 2 * batch}
    with (
        tempfile.TemporaryDirectory() as directory,
        in_comfyui.running_digits(Path(directory, "scene")) as scene,
    ):
        for way, count in pictures.items():
            right[way] = in_comfyui.read_rightly(scene, way, count // 10)
    for way, count in pictures.items():
        assert right[way] >= RIGHT * count, f"{way}: {right[way]} of {count}"
    return {"pictures": pictures, "right": right}


def in_parallel(pictures: int = 20) -> Figures:
    """By one, two and four ranks, in every way to share the work."""
    right = {}
    for ranks, known in ways.WAYS.items():
        with (
            tempfile.TemporaryDirectory() as directory,
            running_ranks(Path(directory, "ranks"), ranks, "--deadline", "60") as scene,
        ):
            found = ways.read_rightly(scene, ranks, *known, pictures=pictures)
        right |= {f"{ranks} ranks, {way}": count for way, count in found.items()}
    assert min(right.values()) >= RIGHT * pictures, right
    return {"pictures_each": pictures, "right": right}


def with_faults(pictures: int = 20) -> Figures:
    """With each deliberate fault, and with none."""
    with tempfile.TemporaryDirectory() as directory:
        right = faults.read_with_swapped_weights(Path(directory, "ranks"), pictures)
    right = {f"swapped: {name}": count for name, count in right.items()}
    for fault in faults.FAULTS:
        with tempfile.TemporaryDirectory() as directory:
            right[fault] = faults.read_with_fault(Path(directory), fault, pictures)
    broken = {name: count for name, count in right.items() if name != "swapped: nothing"}
    assert right["swapped: nothing"] >= RIGHT * pictures, right
    assert max(broken.values()) <= BROKEN * pictures, right
    return {"pictures_each": pictures, "right": right}


STAGES = {
    "meaning-pipeline": by_the_pipeline,
    "meaning-comfyui": inside_comfyui,
    "meaning-parallel": in_parallel,
    "meaning-faults": with_faults,
}
