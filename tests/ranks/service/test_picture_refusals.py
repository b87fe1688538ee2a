"""Pictures that cannot be made: a typed error each, and the ranks go on."""

from __future__ import annotations

import msgspec
import pytest
import torch
from flux_inputs import comfy_inputs
from ranks.service.test_fairness import picture
from ranks_scene import SMALL, User
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import BadJob, MissingComponent

TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "sigmas of two dimensions": {"sigmas": torch.ones(3, 2)},
    "no sigmas": {"sigmas": torch.ones(0)},
    "rising sigmas": {"sigmas": torch.tensor([0.1, 0.9, 0.0])},
    "sigmas that are no numbers": {"sigmas": torch.full((3,), float("nan"))},
    "flat latent": {"latent": torch.zeros(4)},
    "latent of other channels": {"latent": torch.zeros(1, 3, 16, 16)},
    "no latent": {"latent": torch.zeros(0, 4, 16, 16)},
    "noise of another size": {
        "latent": torch.zeros(1, 4, 16, 16),
        "noise": torch.zeros(1, 4, 8, 8),
    },
    "mask of five dimensions": {
        "latent": torch.zeros(1, 4, 16, 16),
        "mask": torch.zeros(1, 1, 1, 1, 1),
    },
    "no mask": {"latent": torch.zeros(1, 4, 16, 16), "mask": torch.zeros(0)},
    "prompt of other rows": {"context": torch.zeros(3, 7, 24)},
    "prompt of another width": {"context": torch.zeros(1, 7, 23)},
    "flat prompt": {"context": torch.zeros(24)},
    "a prompt that is a number": {"context": torch.tensor(1.0)},
    "a pooled text that is a number": {"y": torch.tensor(1.0)},
}
FIELDS: dict[str, dict[str, object]] = {
    "sampler": {"sampler": "unknown"},
    "scheduler": {"scheduler": "unknown"},
    "negative prompt": {"cfg": 2.0},
    "degrees": {"degrees": m.Degrees(ulysses=4)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors(user: User, name: str) -> None:
    job, tensors = picture(user, 2)
    with pytest.raises(BadJob):
        user.ranks.run(job, {**tensors, **TENSORS[name]})


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields(user: User, name: str) -> None:
    job, tensors = picture(user, 2)
    with pytest.raises(BadJob):
        user.ranks.run(msgspec.structs.replace(job, **FIELDS[name]), tensors)


def test_nothing_to_condition_by(user: User) -> None:
    job, _ = picture(user, 2)
    with pytest.raises(BadJob):
        user.ranks.run(job, {})


def test_parts_that_nobody_handed_over(user: User) -> None:
    job, tensors = picture(user, 2)
    ids = {"clip_l_ids": torch.zeros(1, 77, dtype=torch.int64)}
    for wrong, given in [
        (msgspec.structs.replace(job, decode=True), tensors),
        (job, {**ids, "t5_ids": ids["clip_l_ids"]}),
    ]:
        with pytest.raises(MissingComponent):
            user.ranks.run(wrong, given)
    assert user.forward(comfy_inputs(SMALL)).isfinite().all()
