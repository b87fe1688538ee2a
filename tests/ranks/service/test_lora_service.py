"""LoRA per request, beside weights that nobody ever writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lora_files
import pytest
import torch
from flux_inputs import comfy_inputs, run_diffusers
from ranks_scene import SMALL, FluxFile, RanksScene, User
from xdit_sidecar.daemon.ranks.flux.model import build_flux
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.attachment import Attachment
from xdit_sidecar.protocol.errors import BadJob

Tensors = dict[str, torch.Tensor]


def checksum(held: Attachment) -> str:
    """Of every byte that is shared."""
    digest = hashlib.sha256()
    for tensor in held.tensors().values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def patched(file: FluxFile, neutral: Tensors, strength: float) -> torch.nn.Module:
    """The model with the LoRA multiplied out and added, as nobody does it here."""
    weights = dict(file.tensors)
    for name in {key.rpartition(".")[0] for key in neutral}:
        down, up = neutral[f"{name}.down"], neutral[f"{name}.up"]
        scale = strength * neutral.get(f"{name}.alpha", torch.tensor(len(down))).item() / len(down)
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * up @ down
    return build_flux(file.config, weights, torch.float32).model


@pytest.mark.parametrize("layout", ["neutral", "kohya"])
def test_it_is_the_patched_model(
    scene: RanksScene, user: User, tmp_path: Path, layout: str
) -> None:
    tensors = lora_files.neutral(SMALL, 3, alpha=2.0)
    stored = tensors if layout == "neutral" else lora_files.kohya(SMALL, 3, alpha=2.0)
    inputs = comfy_inputs(SMALL)
    with user.lora(tmp_path / "lora.safetensors", stored) as fingerprint:
        found = user.forward(inputs, job=user.job(adapters=[m.Adapter(fingerprint, 0.6)]))
    expected = run_diffusers(patched(scene.file("small"), tensors, 0.6), inputs)
    assert (found - expected).abs().max() < 1e-4
    assert (found - user.forward(inputs)).abs().max() > 1e-2


def test_two_clients_in_turns_one_with_and_one_without(scene: RanksScene, tmp_path: Path) -> None:
    inputs = comfy_inputs(SMALL)
    with (
        scene.user(name="plain") as plain,
        scene.user(name="styled") as styled,
        styled.lora(tmp_path / "lora.safetensors", lora_files.neutral(SMALL, 1)) as one,
        styled.lora(tmp_path / "other.safetensors", lora_files.neutral(SMALL, 2)) as other,
    ):
        before = checksum(plain.held)
        stacks = [
            styled.job(adapters=adapters)
            for adapters in (
                [m.Adapter(one)],
                [m.Adapter(one, -0.5), m.Adapter(other, 0.3)],
                [m.Adapter(other, 0.0)],
            )
        ]
        alone = plain.forward(inputs)
        solo = [styled.forward(inputs, job=job) for job in stacks]
        for _ in range(3):
            for job, expected in zip(stacks, solo, strict=True):
                assert torch.equal(plain.forward(inputs), alone)
                assert torch.equal(styled.forward(inputs, job=job), expected)
        assert torch.equal(solo[2], alone)
        assert (solo[0] - alone).abs().max() > 1e-2
        assert checksum(plain.held) == before


WRONG: dict[str, Tensors] = {
    "another model's": lora_files.neutral(lora_files.Flux(heads=2), 1),
    "half a pair": {"img_in.down": torch.zeros(2, 16)},
    "no such layer": {"img_out.down": torch.zeros(2, 16), "img_out.up": torch.zeros(64, 2)},
    "integers": {
        "img_in.down": torch.zeros(2, 16, dtype=torch.int64),
        "img_in.up": torch.zeros(64, 2, dtype=torch.int64),
    },
    "alpha of nothing": {
        "img_in.down": torch.zeros(2, 16),
        "img_in.up": torch.zeros(64, 2),
        "img_in.alpha": torch.tensor(float("nan")),
    },
    "flat": {"img_in.down": torch.zeros(16), "img_in.up": torch.zeros(64)},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_lora_of_this_model(user: User, tmp_path: Path, name: str) -> None:
    inputs = comfy_inputs(SMALL)
    with (
        user.lora(tmp_path / "lora.safetensors", WRONG[name]) as fingerprint,
        pytest.raises(BadJob),
    ):
        user.forward(inputs, job=user.job(adapters=[m.Adapter(fingerprint)]))
    assert user.forward(inputs).isfinite().all()
