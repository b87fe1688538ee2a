"""What the stage of several GPUs has about speed, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PUBLISHED_SIDE = 1024


@dataclass(frozen=True)
class Speed:
    """Of so many GPUs at one size. Steps in ms, None where that was not measured."""

    gpus: int
    side: int  # pixels
    eager: float | None
    compiled: float | None
    seconds: float  # of a picture by the faster way; of the second one, if there were two
    speed_up: float  # against the fewest GPUs there are
    published: float | None  # seconds, of xDiT


def read_speeds(result: Mapping[str, Any]) -> list[Speed]:
    """One for each size and number of GPUs of ``gpu-several.json``."""
    values = {each["name"]: each["value"] for each in result["figures"]}
    speeds: list[Speed] = []
    for side in (1024, 2048):
        best: dict[int, float] = {}
        for gpus in (1, 2, 4, 8):
            name = {mode: f"{gpus} GPU(s), {mode}, {side}²" for mode in ("off", "auto")}
            steps = {mode: values.get(f"{name[mode]}: a step") for mode in name}
            known = {mode: ms for mode, ms in steps.items() if ms}
            if not known:
                continue
            fastest = min(known, key=lambda mode: known[mode])
            best[gpus] = known[fastest]
            picture = f"{name[fastest]}: 28 steps with text"
            published = result.get("published", {}).get(str(gpus))
            speeds.append(
                Speed(
                    gpus=gpus,
                    side=side,
                    eager=steps["off"],
                    compiled=steps["auto"],
                    seconds=values.get(f"{picture}, again", values[picture]),
                    speed_up=best[min(best)] / best[gpus],
                    published=published if side == _PUBLISHED_SIDE else None,
                )
            )
    return speeds
