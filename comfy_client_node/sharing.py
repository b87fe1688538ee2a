"""Objects that ComfyUI's own loaders made, moved into regions of the daemon."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ..protocol import messages as m
from ..protocol.client.fill import RegionWriter
from ..protocol.fingerprint import fingerprint_tensors
from ..protocol.manifest import lay_out
from ..protocol.regions.views import describe_tensors
from .link import Link, stop_if_interrupted
from .shared_patcher import SharedPatcher
from .shared_weights import ENCODERS, SharedWeights, device_name

_SECONDS = 600.0


class CannotBeShared(RuntimeError):
    """An object whose weights are not ComfyUI's plain tensors."""


def share_vae(link: Link, vae: Any) -> Any:
    """A VAE object on shared weights; the given one's module is used on."""
    vae.throw_exception_if_invalid()
    _check(vae.patcher, "VAE")
    shared = SharedWeights.of(vae.first_stage_model)
    if shared is None:
        shared = SharedWeights(vae.first_stage_model)
        _hand_over(link, shared, vae.first_stage_model, "vae", "", vae.device)
    result = copy.copy(vae)
    result.patcher = SharedPatcher(vae.first_stage_model, vae.device)
    return result


def share_clip(link: Link, clip: Any) -> Any:
    """A CLIP object on shared weights; patches (LoRAs) of the given one stay with it."""
    _check(clip.patcher, "CLIP")
    module = clip.cond_stage_model
    shared = SharedWeights.of(module)
    if shared is None:
        names = [name for name, _ in module.named_parameters()]
        found = {r: p for r, p in ENCODERS.items() if any(n.startswith(p) for n in names)}
        if not found:
            raise CannotBeShared("this CLIP has neither CLIP-L nor T5: it cannot be shared")
        shared = SharedWeights(module)
        for role, prefix in found.items():
            _hand_over(link, shared, module, role, prefix, clip.patcher.load_device)
    result = clip.clone()
    patcher = SharedPatcher.of_clip(clip)
    patcher.patches = {key: list(entries) for key, entries in clip.patcher.patches.items()}
    patcher.patches_uuid = clip.patcher.patches_uuid
    result.patcher = patcher
    return result


def _check(patcher: Any, what: str) -> None:
    probe = getattr(patcher, "is_dynamic", None)
    if probe is not None and probe():
        raise CannotBeShared(
            f"this {what} lies in ComfyUI's dynamic VRAM, which cannot be shared: load it with "
            f"Load {what} (xDiT), or start ComfyUI with --disable-dynamic-vram"
        )
    if patcher.backup or patcher.hook_backup:
        patcher.unpatch_hooks()
        patcher.unpatch_model(patcher.offload_device)


def _hand_over(
    link: Link,
    shared: SharedWeights,
    module: torch.nn.Module,
    role: str,
    prefix: str,
    device: torch.device,
) -> None:
    tensors = {
        name.removeprefix(prefix): parameter.data
        for name, parameter in module.named_parameters()
        if name.startswith(prefix)
    }
    component = m.Component(
        fingerprint=fingerprint_tensors(tensors),
        role=role,
        label=f"{role} of a workflow",
        tensors=lay_out(describe_tensors(tensors)),
    )
    attachment = link.client.hand_over(
        component,
        device_name(device),
        partial(_fill, tensors),
        timeout=_SECONDS,
        should_cancel=stop_if_interrupted,
    )
    shared.adopt(attachment, prefix)


def _fill(tensors: Mapping[str, torch.Tensor], writer: RegionWriter) -> None:
    writer.copy_tensors(tensors)
