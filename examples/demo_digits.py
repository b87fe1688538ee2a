"""A contact sheet of the ten digits, drawn by the ranks with the model in digits/models/."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from digits.files import FILES, MODELS, TOKENIZERS
from digits.pictures import SIDE
from digits.words import DIGITS, prompt
from PIL import Image
from xdit_sidecar.daemon.tokenizers import Tokenizers
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.client.remote import RemoteRanks

DRAW_SECONDS = 600.0  # of a CPU that others use as well

_SEED = 3
_STEPS = 8
_COLUMNS = 5
_GAP = 8  # pixels between pictures, and around them
_ENLARGED = 2


def draw_sheet(
    remote: RemoteRanks,
    compute: m.ComputeDtype,
    hand_over: Callable[[str, str], Attachment],
    out: str,
) -> float:
    """Hand the model over, have ten prompts drawn, save them together as PNG: seconds."""
    start = time.perf_counter()
    held = {role: hand_over(role, str(path)) for role, path in FILES.items()}
    tokenizers = Tokenizers.open(MODELS / TOKENIZERS)
    prompts = [prompt(digit) for digit in range(len(DIGITS))]
    tokens = {
        "clip_l_ids": torch.tensor([tokenizers.clip_l(text)[0] for text in prompts]),
        "t5_ids": torch.tensor([tokenizers.t5(text) for text in prompts]),
    }
    job = m.Generate(
        components={role: each.component.fingerprint for role, each in held.items()},
        tensors=[],
        compute=compute,
        width=SIDE,
        height=SIDE,
        batch=len(prompts),
        steps=_STEPS,
        seed=_SEED,
    )
    _sheet(remote.run(job, tokens, timeout=DRAW_SECONDS)["image"]).save(out)
    for each in held.values():
        each.release()
    return time.perf_counter() - start


def _sheet(pictures: torch.Tensor) -> Image.Image:
    """Pictures (N, H, W, 3) from 0 to 1 in rows of five, twice as large."""
    side = SIDE * _ENLARGED
    rows = -(-len(pictures) // _COLUMNS)
    size = (_COLUMNS * (side + _GAP) + _GAP, rows * (side + _GAP) + _GAP)
    sheet = Image.new("RGB", size, (208, 208, 208))
    for number, picture in enumerate(pictures):
        pixels = (picture * 255).round().byte().contiguous().numpy().tobytes()
        tile = Image.frombytes("RGB", (SIDE, SIDE), pixels).resize((side, side))
        row, column = divmod(number, _COLUMNS)
        sheet.paste(tile, (column * (side + _GAP) + _GAP, row * (side + _GAP) + _GAP))
    return sheet
